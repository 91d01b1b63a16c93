// Attention forward: softmax(scale * q k^T) v by online softmax. Formulas in csrc/api.h.
//
// Queries are rows: scores (queries, keys), out (queries, D). An item of work is a chunk of queries
// of one head. It takes kSpan keys at a time, laid out once for all its strips; each strip takes
// them in block by block, while its sums are at hand, as many queries at once as a tile has rows:
// their scores, their weights, their sums, of the keys that some of them see. With AMX and usual
// head dims they go through a pipeline instead (attention_pipeline.h).
#pragma once
#include "attention_softmax_stage.h"
#include "attention_query.h"

LX_NAMESPACE_BEGIN

constexpr int64_t kStrip = 64;  // queries
constexpr int64_t kMostChunk = 1024, kLeastChunk = 256;
constexpr int64_t kFewQueries = 2;  // up to so many are worked on one by one

// Writes the rows of the n queries from i0 on, the chunk's from `at` on, and their lse.
template <class T, class E>
void finish_tile(T* o, Acc<T>* lse, const Attention& a, const Sequence& s, int64_t h, int64_t i0,
                 int64_t n, const ForwardScratch<E>& w, int64_t at) {
  using A = Acc<E>;
  constexpr int64_t kLane = kLanes<A>, kRows = most(kTileRows<E>, kLane);
  A total[kRows] = {}, top[kRows] = {}, inverse[kRows], ends[kRows];
  for (int r = 0; r < kTileRows<E>; r += 4) {
    Vec<A> sums[4];
    for (int m = 0; m < 4; m++) sums[m] = load(w.sum + (at + r + m) * kLane);
    sum_each(total + r, sums);
    for (int m = r; m < r + 4; m++) top[m] = w.top[at + m] * A(kLnOfBase<E>);
  }
  for (int r = 0; r < kTileRows<E>; r += kLane) {
    Vec<A> inverses, lses;
    end_sums<A>(inverses, lses, load(total + r), load(top + r));
    store(inverse + r, inverses);
    store(ends + r, lses);
  }
  for (int64_t r = 0; r < n; r++) {
    const int64_t i = i0 + r;
    const A by = s.end_key(i) > s.first_key(i) ? inverse[r] : 0;
    const A* out = w.out + (at + r) * w.width;
    T* row = o + ((s.q_row + i) * a.H + h) * a.D;
    for_each_vec<A>(a.D, [&](int64_t d, auto n) { store(row + d, load(out + d, n) * by, n); });
  }
  memcpy(lse + s.lse_at + h * s.lse_stride + i0, ends, n * sizeof(A));
}

template <class T, class E>
void forward_chunk(T* o, Acc<T>* lse, const Attention& a, const Sequence& s, int64_t h,
                   int64_t begin, int64_t end, const ForwardScratch<E>& w) {
  using A = Acc<E>;
  const int64_t D = a.D, queries = end - begin;
  const Scale<E> scale(a.scale);
  const int64_t kv = h / (a.H / a.Hkv);
  const T* q = static_cast<const T*>(a.q) + s.q_at + h * a.q_stride[2];
  const T* k = static_cast<const T*>(a.k) + s.k_at + kv * a.k_stride[2];
  const T* v = static_cast<const T*>(a.v) + s.v_at + kv * a.v_stride[2];
  // Queries that see no key.
  for (int64_t i = begin; i < end; i += kTileRows<E>) {
    const int64_t n = least(kTileRows<E>, end - i), at = i - begin;
    if (s.end_key(i + n - 1) > s.first_key(i)) continue;
    begin_tile(w, at);
    memset(w.out + at * w.width, 0, kTileRows<E> * w.width * sizeof(A));
    finish_tile(o, lse, a, s, h, i, n, w, at);
  }
  const int64_t padded = round_up(queries, kTileRows<E>);
  lines<E>(w.queries, w.units, padded, q + begin * a.q_stride[1], a.q_stride[1], queries, D);
  const int64_t keys_end = s.end_key(end - 1);
  const auto lay_out = [&](int64_t span, int64_t j0, auto apart) {
    const int64_t at = j0 - span, left = s.S - j0;
    transposed_lines<E>(w.keys + at * w.units, kBlock, kBlock, D, [&](int64_t j) {
      return j < left ? k + (j0 + j) * a.k_stride[1] : nullptr;
    });
    pairs<E, apart>(w.values + at / kUnit<E> * w.width, w.width, kBlock, v + j0 * a.v_stride[1],
                    a.v_stride[1], least(kBlock, left), D);
  };
  const int64_t first_span = s.first_key(begin) / kBlock * kBlock;
#if defined(__AMX_BF16__)
  if constexpr (kAmx<E>) {
    if (goes_by_pipeline<E>(D, scale)) {
      for (int64_t span = first_span; span < keys_end; span += w.span) {
        const int64_t span_end = least(span + w.span, keys_end);
        for (int64_t j0 = span; j0 < span_end; j0 += kBlock)
          lay_out(span, j0, std::integral_constant<int64_t, kApart>{});
        const auto finish = [&](const PipelineTile& tile) {
          finish_tile(o, lse, a, s, h, tile.row, tile.n, w, tile.row - begin);
        };
        if (w.width == 64)
          forward_pipeline<64>(w, s, begin, end, span, span_end, scale.factor, finish);
        else
          forward_pipeline<128>(w, s, begin, end, span, span_end, scale.factor, finish);
      }
      return;
    }
  }
#endif
  for (int64_t span = first_span; span < keys_end; span += w.span) {
    int ready = 0;  // blocks laid out, as soon as a strip sees them
    for (int64_t strip = begin; strip < end; strip += kStrip) {
      const int64_t strip_end = least(strip + kStrip, end);
      const int64_t seen = least(s.end_key(strip_end - 1), span + w.span);
      for (; span + ready * kBlock < seen; ready++)
        lay_out(span, span + ready * kBlock, std::integral_constant<int64_t, 1>{});
      for (int64_t j0 = span; j0 < seen; j0 += kBlock)
        for (int64_t i = strip; i < strip_end; i += kTileRows<E>) {
          const int64_t n = least(kTileRows<E>, strip_end - i), last = s.end_key(i + n - 1);
          forward_tile<E>(w, i - begin, (j0 - span) / kBlock, s, i, n, j0, D, scale);
          if (last > j0 && last <= j0 + kBlock && last > s.first_key(i))
            finish_tile(o, lse, a, s, h, i, n, w, i - begin);
        }
    }
  }
}

// Queries for which a span of keys is laid out once: many, but enough chunks to share out.
inline int64_t chunk_of(const Attention& a, int64_t threads) {
  int64_t chunk = kMostChunk;
  while (chunk > kLeastChunk && sequences(a) * a.H * (longest(a) / chunk) < 4 * threads)
    chunk /= 2;
  return chunk;
}

// Keys that are laid out at once.
template <class E> int64_t span_of([[maybe_unused]] const Attention& a) {
#if defined(__AMX_BF16__)
  if (goes_by_pipeline<E>(a.D, Scale<E>(a.scale)))
    return least(pipeline_span(a.D), round_up(longest_keys(a), kBlock));
#endif
  return kSpan;
}

// Keys are not split.
int64_t attention_fwd_parts(const Attention*) { return 1; }

Status attention_fwd(void* o, void* lse, void*, const Attention* attention, Stream stream) {
  const Attention& a = *attention;
  return dispatch(a.dtype, [&](auto t) {
    using T = decltype(t);
    using E = Factor<T>;
    const int64_t size = chunk_of(a, num_threads(stream));
    const int64_t span = span_of<E>(a);
    const int64_t chunks = (longest(a) + size - 1) / size, items = a.B * a.H * chunks;
    const int64_t heads = heads_of(a, num_threads(stream));
    const int64_t bytes = most(ForwardScratch<E>(nullptr, a.D, size, span).bytes,
                               QueryScratch<T>(nullptr, a.D, heads).bytes);
    const Scratch scratch(bytes * num_threads(stream));
    if (!scratch.begin()) return kOutOfMemory;
    parallel_items(stream, items, [&](int64_t item, int64_t thread) {
      const int64_t chunk = chunks - 1 - item / (a.B * a.H);  // the longest first
      const int64_t b = item / a.H % a.B, h = item % a.H;
      const Sequence s(a, b);
      char* memory = scratch.begin() + thread * bytes;
      const int64_t begin = chunk * size, end = least(begin + size, s.T);
      if (end - begin > kFewQueries) {
        [[maybe_unused]] const TileState<E> tiles;
        forward_chunk<T, E>(static_cast<T*>(o), static_cast<Acc<T>*>(lse), a, s, h, begin, end,
                            ForwardScratch<E>(memory, a.D, size, span));
      } else if (h % heads == 0) {
        for (int64_t i = begin; i < end; i++)
          forward_query<T>(static_cast<T*>(o), static_cast<Acc<T>*>(lse), a, s, h,
                           least(h + heads, a.H), i, QueryScratch<T>(memory, a.D, heads));
      }
    });
    return kOk;
  });
}

LX_NAMESPACE_END
