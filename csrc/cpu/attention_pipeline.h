// Attention's forward as a pipeline through AMX's tiles, but for the softmax itself.
//
// Its unit is 16 rows, queries, by 32 columns, keys. Scores are products of the rows' lines and the
// columns; a stage turns them into weights, and the products of those and of the columns' values
// add up to the rows' sums. While the vector instructions make the weights of one unit, the tiles
// multiply the scores of a later one and the values of the one before, a product or two for every
// two rows of weights: so finely mixed the two work side by side. Products wait, in the order of
// the program, for what they need, so nothing is asked for before two or three others have passed:
// scores are stored a step after their products and read another step later. The sums of 64 columns
// of the values stay in the tile registers until the next tile of rows begins; those of 64 more are
// then made from the tile's weights, which are kept for that.
#pragma once
#include "attention.h"

LX_NAMESPACE_BEGIN

#if defined(__AMX_BF16__)

constexpr int64_t kUnitColumns = 32;

// Whether a forward of E goes this way: head dims whose rows are padded to 64 or 128.
template <class E> inline bool goes_by_pipeline(int64_t D, const Scale<E>& scale) {
  const bool fits = (D > 48 && D <= 64) || (D > 112 && D <= 128);
  return kAmx<E> && fits && !scale.negative;
}

// Units are of bf16 kApart columns apart: that makes them of two vectors of numbers at the least
// cost. (vcvtne2ps2bf16, which takes what follows each other, waits for the products of tiles.)
constexpr int64_t kApart = kAmxSide;
inline Vec32 units(__m512i low, __m512i high) {  // whose upper halves are bf16
  return (Vec32)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high);
}
// Rounded to bf16 in the upper half; a number half way between two goes to the larger.
inline __m512i rounded(Vec32 x) { return _mm512_add_epi32((__m512i)x, _mm512_set1_epi32(0x8000)); }

struct PipelineTile {
  int64_t row, n;       // its first row, how many rows there are
  bool resumes, final;  // it has sums from before this run, will have no more after it
  const float* lines;   // (16, D units)
  float* sums;          // (16, width)
  int64_t from, to;     // its columns; none: from >= to
};

struct PipelineUnit {
  const PipelineTile* tile;
  int64_t column;        // its first
  bool begins, ends;     // of the tile's units it is the first, the last
  const float* columns;  // (D units, kBlock)
  const float* values;   // (16 units, width)
};

// The units of tiles of rows, tile by tile: tile(i) is the i'th of n; place(unit) finds where its
// columns and values are.
template <class Tile, class Place> class PipelineUnits {
 public:
  PipelineUnits(int64_t n, const Tile& tile, const Place& place)
      : n_(n), tile_(tile), place_(place) {}

  bool next(PipelineUnit& unit) {
    unit.begins = column_ >= end_;
    while (column_ >= end_) {
      if (i_ >= n_) return false;
      const PipelineTile tile = tile_(i_++);
      if (tile.from >= tile.to) continue;
      ring_[++last_ % 8] = tile;
      column_ = tile.from / kUnitColumns * kUnitColumns;
      end_ = tile.to;
    }
    unit.tile = &ring_[last_ % 8];
    unit.column = column_;
    column_ += kUnitColumns;
    unit.ends = column_ >= end_;
    place_(unit);
    return true;
  }

 private:
  const int64_t n_;
  const Tile tile_;
  const Place place_;
  PipelineTile ring_[8];  // more than there are units at a time
  int64_t i_ = 0, last_ = -1, column_ = 0, end_ = 0;
};

// Rows of sums of 64, or 128, numbers. A stage has
//   weights(i)                     where the weights of unit i (of the run) are: (16, 16 units)
//   prepare(unit, i, scores)       before the rows of a unit, of its scores (16, 32)
//   rows()                         what they need then
//   make<r>(rows)                  makes the weights of rows r and r + 1; static
//   usual(rows)                    after them: whether that was all
//   take_carefully(unit, i)        where not: the tile's sums so far are in memory meanwhile
//   finish(tile)                   when the sums of this run are in memory
template <class Stage, int64_t kWidth> class Pipeline {
 public:
  explicit Pipeline(Stage& stage) : stage_(stage) {}

  template <class Units> void run(Units& units) {
    PipelineUnit ring[4];  // before, now, stored, next, in turn
    bool there[4] = {};
    for (int64_t step = 0;; step++) {
      const auto unit = [&](int64_t i) { return there[i & 3] ? &ring[i & 3] : nullptr; };
      there[step & 3] = units.next(ring[step & 3]);
      const PipelineUnit *next = unit(step), *stored = unit(step - 1), *now = unit(step - 2),
                         *before = unit(step - 3);
      const bool leaves = !before || before->begins;  // the tile whose sums are held
      if (leaves && held_sums_ && (kWidth > 64 || !before)) store_held(step - 3);
      if (!next && !stored && !now && !before) break;
      take(step, before, now, stored, next);
      if (!leaves || !before) continue;
      if (held_sums_) stage_.finish(*held_.tile);
      held_ = *before;
      held_sums_ = held_.tile->sums;
      held_begin_ = step - 3;
    }
    if (held_sums_) stage_.finish(*held_.tile);
  }

 private:
  static constexpr int64_t kLineBytes = kWidth / 2 * sizeof(float);
  static constexpr int64_t kBytes = kWidth * sizeof(float);  // of a row of sums, or of values
  static constexpr int64_t kScoresBytes = kUnitColumns * sizeof(float);

  // Products of 32 of the head dim, for half of the unit's columns.
  template <int part> void multiply_scores(const PipelineUnit* unit, int depth) {
    if (!unit) return;
    if (part == 0) amx_load<6>(unit->tile->lines + depth * 16, kLineBytes);
    if (depth == 0) amx_zero<4 + part>();
    amx_load<7>(unit->columns + depth * 16 * kBlock + part * 16, kBlock * sizeof(float));
    amx_multiply_add<4 + part, 6, 7>();
  }
  template <int part> void store_scores(const PipelineUnit* unit, int64_t step) {
    if (unit) amx_store<4 + part>(scores_[step & 1] + part * 16, kScoresBytes);
  }
  // The product of the weights and 16 columns of the values.
  template <int part> void multiply_values(const PipelineUnit* unit, const float* weights) {
    if (!unit) return;
    if (unit->begins) {
      if (held_sums_ && kWidth == 64) amx_store<part>(held_sums_ + part * 16, kBytes);
      if (unit->tile->resumes) amx_load<part>(unit->tile->sums + part * 16, kBytes);
      else amx_zero<part>();
    }
    if (part % 2 == 0 || kWidth > 64) amx_load<6>(weights, 16 * sizeof(float));
    amx_load<7>(unit->values + part * 16, kBytes);
    amx_multiply_add<part, 6, 7>();
  }
  void load_sums(const float* sums) {
    amx_load<0>(sums, kBytes);
    amx_load<1>(sums + 16, kBytes);
    amx_load<2>(sums + 32, kBytes);
    amx_load<3>(sums + 48, kBytes);
  }
  void store_sums(float* sums) {
    amx_store<0>(sums, kBytes);
    amx_store<1>(sums + 16, kBytes);
    amx_store<2>(sums + 32, kBytes);
    amx_store<3>(sums + 48, kBytes);
  }

  // Ends the tile in the registers, whose units go up to `end`: makes the sums of other columns.
  void store_held(int64_t end) {
    store_sums(held_sums_);
    for (int64_t column = 64; column < kWidth; column += 64) {
      if (held_.tile->resumes) {
        load_sums(held_sums_ + column);
      } else {
        amx_zero<0>();
        amx_zero<1>();
        amx_zero<2>();
        amx_zero<3>();
      }
      const float* values = held_.values + column;
      for (int64_t i = held_begin_; i < end; i++, values += kUnitColumns / 2 * kWidth) {
        amx_load<6>(stage_.weights(i), 16 * sizeof(float));
        amx_load<7>(values, kBytes);
        amx_multiply_add<0, 6, 7>();
        amx_load<7>(values + 16, kBytes);
        amx_multiply_add<1, 6, 7>();
        amx_load<7>(values + 32, kBytes);
        amx_multiply_add<2, 6, 7>();
        amx_load<7>(values + 48, kBytes);
        amx_multiply_add<3, 6, 7>();
      }
      store_sums(held_sums_ + column);
    }
  }

  void take(int64_t step, const PipelineUnit* before, const PipelineUnit* now,
            const PipelineUnit* stored, const PipelineUnit* next) {
    if (now) stage_.prepare(*now, step - 2, scores_[step & 1]);
    auto rows = stage_.rows();
    const float* weights = before ? stage_.weights(step - 3) : nullptr;
    store_scores<0>(stored, step + 1);
    multiply_scores<0>(next, 0);
    if (now) Stage::template make<0>(rows);
    store_scores<1>(stored, step + 1);
    multiply_scores<1>(next, 0);
    if (now) Stage::template make<2>(rows);
    if constexpr (kWidth == 64) {
      multiply_values<0>(before, weights);
      if (now) Stage::template make<4>(rows);
      multiply_values<1>(before, weights);
      if (now) Stage::template make<6>(rows);
      multiply_scores<0>(next, 1);
      if (now) Stage::template make<8>(rows);
      multiply_scores<1>(next, 1);
      if (now) Stage::template make<10>(rows);
      multiply_values<2>(before, weights);
      if (now) Stage::template make<12>(rows);
      multiply_values<3>(before, weights);
    } else {
      multiply_values<0>(before, weights);
      multiply_scores<0>(next, 1);
      if (now) Stage::template make<4>(rows);
      multiply_scores<1>(next, 1);
      multiply_values<1>(before, weights);
      if (now) Stage::template make<6>(rows);
      multiply_scores<0>(next, 2);
      if (now) Stage::template make<8>(rows);
      multiply_scores<1>(next, 2);
      multiply_values<2>(before, weights);
      if (now) Stage::template make<10>(rows);
      multiply_scores<0>(next, 3);
      if (now) Stage::template make<12>(rows);
      multiply_scores<1>(next, 3);
      multiply_values<3>(before, weights);
    }
    if (now) Stage::template make<14>(rows);
    if (!now || stage_.usual(rows)) return;
    if (!now->begins) store_sums(now->tile->sums);
    stage_.take_carefully(*now, step - 2);
    if (!now->begins) load_sums(now->tile->sums);
  }

  Stage& stage_;
  PipelineUnit held_ = {};  // the first unit of the tile whose sums are in the registers
  float* held_sums_ = nullptr;  // where they belong
  int64_t held_begin_ = 0;  // its number
  alignas(64) float scores_[2][kAmxSide * kUnitColumns];
};

#endif

LX_NAMESPACE_END
