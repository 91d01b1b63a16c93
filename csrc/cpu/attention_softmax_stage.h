// The softmax of attention's forward as a stage of the pipeline through AMX's tiles.
#pragma once
#include "attention_pipeline.h"
#include "attention_tile.h"

LX_NAMESPACE_BEGIN

#if defined(__AMX_BF16__)

// Keys that are laid out at once: half a megabyte, and a quarter, with the values.
inline int64_t pipeline_span(int64_t D) { return D <= 64 ? 2048 : 512; }

alignas(64) constexpr float kNoSums[kAmxSide * 16] = {};

// Online softmax. finish(tile) is called for tiles that have seen all of their keys.
template <int64_t kWidth, class Finish> class SoftmaxStage {
 public:
  SoftmaxStage(const ForwardScratch<bf16>& w, const Sequence& s, int64_t begin, float factor,
               const Finish& finish)
      : w_(w), s_(s), begin_(begin), factor_(factor), finish_(finish) {
    rows_.limit = limit_;
    rows_.factor = splat(factor);
    rows_.usual = 0xffff;
  }

  struct Rows {
    const float *scores, *top, *limit, *totals_before;
    float *weights, *totals;
    Vec32 factor;
    __mmask16 usual;  // of lanes without NaN, or scores above the row's limit, so far
  };

  float* weights(int64_t i) { return weights_ + i % kSlots * kAmxSide * 16; }
  static bool usual(const Rows& rows) { return rows.usual == 0xffff; }
  void finish(const PipelineTile& tile) {
    if (tile.final) finish_(tile);
  }

  void prepare(const PipelineUnit& unit, int64_t i, float* scores) {
    const PipelineTile& tile = *unit.tile;
    const int64_t keys_end = unit.column + kUnitColumns;
    if (s_.first_key(tile.row + tile.n - 1) > unit.column || s_.end_key(tile.row) < keys_end)
      for (int64_t r = 0; r < kAmxSide; r++) {
        const int64_t from = s_.first_key(tile.row + r) - unit.column;
        const int64_t to = s_.end_key(tile.row + r) - unit.column;
        hide(scores + r * kUnitColumns, kUnitColumns, clamp(from, 0, kUnitColumns),
             clamp(to, 0, kUnitColumns));
      }
    const int64_t at = tile.row - begin_;
    float* tile_totals = w_.sum + at * 16;
    rows_.totals_before = rows_.totals;
    if (unit.begins) {
      rows_.top = tops_ = w_.top + at;
      tile_begin_ = i;
      rows_.totals_before = kNoSums;
      if (tile.resumes)
        rows_.totals_before = static_cast<float*>(
            memcpy(totals_[1 - i % 2], tile_totals, sizeof totals_[0]));
      else
        find_tops(scores);
      bound();
    }
    rows_.scores = scores;
    rows_.weights = weights(i);
    rows_.totals = unit.ends ? tile_totals : totals_[i % 2];
    rows_.usual = 0xffff;
  }
  Rows rows() const { return rows_; }

  template <int row> __attribute__((always_inline)) static void make(Rows& rows) {
#pragma GCC unroll 2
    for (int r = row; r < row + 2; r++) {
      const Vec32 a = load(rows.scores + r * 32), b = load(rows.scores + r * 32 + 16);
      const __m512 limit = _mm512_set1_ps(rows.limit[r]);
      rows.usual = _mm512_mask_cmp_ps_mask(rows.usual, (__m512)a, limit, _CMP_LE_OQ);
      rows.usual = _mm512_mask_cmp_ps_mask(rows.usual, (__m512)b, limit, _CMP_LE_OQ);
      const Vec32 top = (Vec32)_mm512_set1_ps(rows.top[r]);
      add_weights(rows, r, exp2_near<bf16>(a * rows.factor - top),
                  exp2_near<bf16>(b * rows.factor - top), load(rows.totals_before + r * 16));
    }
  }

  // The rows that are not usual: their top rises by more than kRise, or they have NaN. The others
  // stay as they are.
  void take_carefully(const PipelineUnit& unit, int64_t i) {
    for (int r = 0; r < kAmxSide; r++) {
      const Vec32 a = load(rows_.scores + r * 32), b = load(rows_.scores + r * 32 + 16);
      if (!any(!(a <= limit_[r])) && !any(!(b <= limit_[r]))) continue;
      float &top = tops_[r], decay = 1;
      const float before = top, largest = reduce<16>(kLarger(a, b), kLarger) * factor_;
      if (largest - before > kRise) {
        top = largest;
        if (before != kNoTop<float>) {
          decay = exp2_near<bf16>(splat(before - top))[0];
          scale_row(unit.tile->sums, i, r, decay);
        }
      }
      add_weights(rows_, r, exp2_near<bf16>(a * factor_ - top), exp2_near<bf16>(b * factor_ - top),
                  load(rows_.totals_before + r * 16) * decay);
    }
    bound();
  }

 private:
  static constexpr int64_t kSlots = kWidth > 64 ? 512 / kUnitColumns + 2 : 2;  // of units' weights

  // Row r of the weights and of their totals.
  __attribute__((always_inline)) static void add_weights(const Rows& rows, int r, Vec32 low,
                                                         Vec32 high, Vec32 total) {
    store(rows.weights + r * 16, units(rounded(low), rounded(high)));
    store(rows.totals + r * 16, total + (low + high));
  }

  // The largest of each row of a unit's scores.
  void find_tops(const float* scores) {
    for (int r = 0; r < kAmxSide; r += 4) {
      Vec32 largest[4];
#pragma GCC unroll 4
      for (int m = 0; m < 4; m++) {
        const float* row = scores + (r + m) * kUnitColumns;
        largest[m] = kLarger(load(row), load(row + 16));
      }
      reduce_each(tops_ + r, largest, kLarger);
    }
    store(tops_, kLarger(load(tops_) * factor_, splat(kNoTop<float>)));
  }

  // What the rows' scores are compared to.
  void bound() { store(limit_, (load(tops_) + kRise) / factor_); }

  // Row r of the sums of the values, and of the weights whose other columns are still to come.
  void scale_row(float* sums, int64_t i, int r, float by) {
    for (int64_t at = r * kWidth; at < (r + 1) * kWidth; at += 16)
      store(sums + at, load(sums + at) * by);
    for (int64_t earlier = tile_begin_; kWidth > 64 && earlier < i; earlier++)
      for (int half = 0; half < 2; half++) {
        bf16* row = reinterpret_cast<bf16*>(weights(earlier) + r * 16 + half * 8);
        store(row, load(row) * by);
      }
  }

  const ForwardScratch<bf16>& w_;
  const Sequence& s_;
  const int64_t begin_;  // the chunk's first query
  const float factor_;
  const Finish finish_;
  int64_t tile_begin_ = 0;  // the number of the tile's first unit
  float* tops_ = nullptr;
  Rows rows_ = {};
  alignas(64) float weights_[kSlots * kAmxSide * 16];
  alignas(64) float totals_[2][kAmxSide * 16];  // of the weights, in lanes
  alignas(64) float limit_[16];
};

// The queries [begin, end) take in the keys [span, span_end), which are laid out.
template <int64_t kWidth, class Finish>
void forward_pipeline(const ForwardScratch<bf16>& w, const Sequence& s, int64_t begin, int64_t end,
                      int64_t span, int64_t span_end, float factor, const Finish& finish) {
  const auto tile = [&](int64_t i) {
    const int64_t at = i * kAmxSide, row = begin + at, n = least(kAmxSide, end - row);
    const int64_t first = s.first_key(row), last = s.end_key(row + n - 1);
    return PipelineTile{.row = row,
                        .n = n,
                        .resumes = first < span,
                        .final = last <= span_end,
                        .lines = w.queries + at * w.units,
                        .sums = w.out + at * kWidth,
                        .from = most(first, span),
                        .to = last > first ? least(last, span_end) : 0};
  };
  const auto place = [&](PipelineUnit& unit) {
    const int64_t key = unit.column - span;
    unit.columns = w.keys + key / kBlock * kBlock * w.units + key % kBlock;
    unit.values = w.values + key / 2 * kWidth;
  };
  SoftmaxStage<kWidth, Finish> stage(w, s, begin, factor, finish);
  PipelineUnits units((end - begin + kAmxSide - 1) / kAmxSide, tile, place);
  Pipeline<decltype(stage), kWidth>(stage).run(units);
}

#endif

LX_NAMESPACE_END
