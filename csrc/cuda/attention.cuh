// What attention's kernels share: where sequences lie, who sees whom, and tiles of 16-bit values in
// shared memory. Formulas in csrc/api.h.
//
// B batch, T queries, S keys, H heads, Hkv key/value heads, D head dim, kHeadDim the D that a
// kernel is compiled for (D or the next larger one, the columns between are zero).
#pragma once
#include "launch.cuh"
#include "reduce.cuh"

namespace lx {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

constexpr int64_t kMaxTokens = 1 << 29;  // T and S, so that sums of three are ints

// One sequence of the batch. Query i sees the keys [first_key(i), end_key(i)); key j is seen by the
// queries [first_query(j), end_query(j)); all four rise, and stay within the sequence. A query that
// sees nothing has end_key(i) <= first_key(i).
struct Sequence {
  int T, S;                    // its queries and keys
  int64_t q_row, k_row;        // its first row in o and dq, in dk and dv
  int64_t q_at, k_at, v_at;    // element offset of its first token, head 0
  int64_t lse_at, lse_stride;  // lse of head h, query i is at lse_at + h * lse_stride + i
  int ahead, behind;           // query i sees key j when -behind <= j - i <= ahead

  Sequence() = default;
  __device__ Sequence(const Attention& a, int b) {
    const bool packed = a.cu_q;
    q_row = packed ? a.cu_q[b] : b * a.T;
    k_row = packed ? a.cu_k[b] : b * a.S;
    T = packed ? a.cu_q[b + 1] - int(q_row) : int(a.T);
    S = packed ? a.cu_k[b + 1] - int(k_row) : int(a.S);
    q_at = packed ? q_row * a.q_stride[1] : b * a.q_stride[0];
    k_at = packed ? k_row * a.k_stride[1] : b * a.k_stride[0];
    v_at = packed ? k_row * a.v_stride[1] : b * a.v_stride[0];
    lse_at = packed ? q_row : b * a.H * a.T;
    lse_stride = a.T;
    const int limit = int(kMaxTokens);  // farther away than any two tokens of one sequence
    const int window = a.window && a.window < limit ? int(a.window) : limit;
    ahead = S - T + (a.causal ? 0 : window - 1);
    behind = window - 1 - (S - T);
  }
  __device__ int first_key(int i) const { return min(max(i - behind, 0), S); }
  __device__ int end_key(int i) const { return min(max(i + ahead + 1, 0), S); }
  __device__ int first_query(int j) const { return min(max(j - ahead, 0), T); }
  __device__ int end_query(int j) const { return min(max(j + behind + 1, 0), T); }
};

// Tiles [begin, end) are those in which anything is seen; of them [full_begin, full_end), maybe
// none, are seen whole and need no mask.
struct TileRange {
  int begin, end, full_begin, full_end;
};

// The same in every lane, known to the compiler: without it the loops over tiles get code for warps
// whose lanes have parted.
__device__ inline TileRange uniform(const TileRange& r) {
  return {__shfl_sync(kAllLanes, r.begin, 0), __shfl_sync(kAllLanes, r.end, 0),
          __shfl_sync(kAllLanes, r.full_begin, 0), __shfl_sync(kAllLanes, r.full_end, 0)};
}

// Of the tiles of kWidth keys, for the queries [i0, i1), i0 < i1 <= T.
template <int kWidth> __device__ TileRange key_tiles(const Sequence& s, int i0, int i1) {
  const int end = s.end_key(i1 - 1), begin = min(s.first_key(i0), end);
  const int full_begin = s.first_key(i1 - 1), full_end = max(s.end_key(i0), full_begin);
  TileRange r{begin / kWidth, (end + kWidth - 1) / kWidth, (full_begin + kWidth - 1) / kWidth,
              full_end / kWidth};
  if (begin == end) r.end = r.begin;
  if (r.full_begin >= r.full_end) r.full_begin = r.full_end = r.begin;
  return r;
}

// Of the tiles of kHeight queries, for the keys [j0, j1), j0 < j1 <= S.
template <int kHeight> __device__ TileRange query_tiles(const Sequence& s, int j0, int j1) {
  const int end = s.end_query(j1 - 1), begin = min(s.first_query(j0), end);
  const int full_begin = s.first_query(j1 - 1), full_end = max(s.end_query(j0), full_begin);
  TileRange r{begin / kHeight, (end + kHeight - 1) / kHeight,
              (full_begin + kHeight - 1) / kHeight, full_end / kHeight};
  if (begin == end) r.end = r.begin;
  if (r.full_begin >= r.full_end) r.full_begin = r.full_end = r.begin;
  return r;
}

// Sequences differ in length, and packed offsets are known on the device only. So the grid has
// seats for the most tiles of kHeight tokens that there can be: sequence b, at tokens cu[b] to
// cu[b + 1], has the seats cu[b] / kHeight + b to cu[b + 1] / kHeight + b + 1, which are its tiles
// and at most one more.
inline int64_t tile_seats(const int32_t* cu, int64_t B, int64_t tokens, int height) {
  return cu ? tokens / height + B : B * ceil_div(tokens, height);
}

// The sequence and tile of a seat; tiles of a sequence come last to first when `descending`. The
// tile may not exist: then it is -1 (descending) or begins at or past the sequence's end.
struct Seat {
  int b, tile;
};
__device__ inline Seat seat_of(const int32_t* cu, int B, int tokens, int height, int seat,
                               bool descending) {
  if (!cu) {
    const int tiles = (tokens + height - 1) / height, tile = seat % tiles;
    return {seat / tiles, descending ? tiles - 1 - tile : tile};
  }
  int low = 0, high = B - 1;  // the last sequence that begins at or before this seat
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (cu[middle] / height + middle <= seat) low = middle;
    else high = middle - 1;
  }
  const int tile = seat - (cu[low] / height + low);
  const int tiles = (cu[low + 1] - cu[low] + height - 1) / height;
  return {low, descending ? tiles - 1 - tile : tile};
}

// What a block of the forward works on: a head, and the queries of a sequence from i0 on. i0 may
// lie outside: then there is nothing to do.
struct Place {
  int b, h, i0;
};

constexpr int64_t kMaxBlocks = 1 << 30;   // so that they are counted, and divided, as ints
constexpr int64_t kL2Bytes = 40ll << 20;  // of an A100

// How blocks are handed out: the seats of `at_once` heads (of all batches, unless packed) before
// the next heads', so that their K and V stay in L2; among these the seats that see most first, so
// that the last blocks to run are short ones.
struct Order {
  int64_t heads, seats;
  int at_once;

  Order(const Attention& a, int height, int64_t element_bytes)
      : heads(a.cu_q ? a.H : a.B * a.H),
        seats(tile_seats(a.cu_q, a.cu_q ? a.B : 1, a.T, height)) {
    const int64_t bytes = a.S / (a.cu_q ? a.B : 1) * a.D * 2 * element_bytes;  // of K and V
    const int64_t fit = kL2Bytes / 2 * (a.H / a.Hkv) / (bytes + 1);
    at_once = int(fit < 1 ? 1 : fit < heads ? fit : heads);
  }
  bool too_large() const { return heads * seats >= kMaxBlocks; }
};

__device__ inline Place place_of(const Attention& a, int height, int at_once, int seats) {
  const int H = int(a.H), heads = a.cu_q ? H : int(a.B) * H;
  const unsigned group = blockIdx.x / unsigned(at_once * seats) * at_once;
  const unsigned in_group = blockIdx.x % unsigned(at_once * seats);
  const unsigned size = min(unsigned(at_once), heads - group);
  const int head = group + in_group % size, number = in_group / size;
  if (!a.cu_q) return {head / H, head % H, (seats - 1 - number) * height};
  const Seat seat = seat_of(a.cu_q, int(a.B), int(a.T), height, number, true);
  return {seat.b, head, seat.tile * height};
}

// Where the pieces of 16 bytes of a tile's rows of kHeadDim 16-bit values lie in shared memory, so
// that eight rows of one column, which ldmatrix reads together, and eight columns of one row, which
// a copy writes together, fall into different banks. Here piece p of row r is in place p ^ (r % 8)
// of its row.
template <int kHeadDim> struct Swizzle {
  static_assert(kHeadDim % 64 == 0, "rows are a multiple of 128 bytes, once around the banks");
  static constexpr int kRowBytes = kHeadDim * 2, kPieces = kHeadDim / 8;
  static constexpr int kAddresses = 4;  // columns so many blocks of 16 apart are a constant apart

  __device__ static uint32_t offset(int row, int piece) {
    return row * kRowBytes + ((piece ^ (row % 8)) * 16);
  }
};

// Here each row is followed by 16 bytes of nothing: a little more memory than Swizzle, but one
// register is enough to address all of a tile.
template <int kHeadDim> struct Padded {
  static_assert(kHeadDim % 64 == 0, "rows begin 16 bytes further around the banks each");
  static constexpr int kRowBytes = kHeadDim * 2 + 16, kPieces = kHeadDim / 8;
  static constexpr int kAddresses = 1;

  __device__ static uint32_t offset(int row, int piece) { return row * kRowBytes + piece * 16; }
};

// Copies rows of a strided matrix in global memory into tiles. Each thread has one piece of every
// kRows-th row; its columns from D on are left alone: zero them once by zero_columns.
template <class T, int kHeadDim, int kThreads, class Layout = Swizzle<kHeadDim>> struct TileLoader {
  static constexpr int kRows = kThreads / Layout::kPieces;  // at once
  static_assert(kThreads % Layout::kPieces == 0, "a thread keeps to one column");

  const char* from;   // this thread's piece of row `row`
  int64_t row_bytes;  // from row to row
  int row, piece;
  bool has_columns;

  // rows: (any number of rows, D), aligned to 16 bytes as is each row. thread: 0 to kThreads - 1.
  __device__ TileLoader(const T* rows, int64_t stride, int D, int thread)
      : row_bytes(stride * int64_t(sizeof(T))),
        row(thread / Layout::kPieces),
        piece(thread % Layout::kPieces),
        has_columns(piece * 8 < D) {
    from = reinterpret_cast<const char*>(rows + row * stride) + piece * 16;
  }
  __device__ uint32_t place(int step) const {  // of row `row + step * kRows` in a tile
    if constexpr (kRows % 8 == 0 || Layout::kAddresses == 1)
      return Layout::offset(row, piece) + step * kRows * Layout::kRowBytes;
    else return Layout::offset(row + step * kRows, piece);
  }
  // Rows [first, first + kTileRows), all of which exist.
  template <int kTileRows> __device__ void load(uint32_t s_tile, int first) const {
    static_assert(kTileRows % kRows == 0, "all threads copy equally many rows");
    const char* p = ptx::opaque(from + first * row_bytes);
#pragma unroll
    for (int step = 0; step < kTileRows / kRows; step++) {
      if (has_columns) ptx::cp_async(s_tile + place(step), p);
      p = ptx::opaque(p + kRows * row_bytes);
    }
  }
  // The same, with zeros for the rows from `end` on.
  template <int kTileRows> __device__ void load(uint32_t s_tile, int first, int end) const {
    static_assert(kTileRows % kRows == 0, "all threads copy equally many rows");
    const char* p = ptx::opaque(from + first * row_bytes);
#pragma unroll
    for (int step = 0; step < kTileRows / kRows; step++) {
      const int bytes = first + row + step * kRows < end ? 16 : 0;
      if (has_columns) ptx::cp_async_zero_fill(s_tile + place(step), p, bytes);
      p = ptx::opaque(p + kRows * row_bytes);
    }
  }
  // Zeros the columns from D on; they stay so. Readers need a barrier before, as after a copy.
  template <int kTileRows> __device__ void zero_columns(uint32_t s_tile) const {
    if (!has_columns)
#pragma unroll
      for (int step = 0; step < kTileRows / kRows; step++)
        ptx::cp_async_zero_fill(s_tile + place(step), from, 0);
  }
};

// Where a lane finds its row of a 16 x 16 block X of a tile for ldmatrix, so that the registers
// come in the order in which mma takes them (in pairs and fours that lie side by side):
//   X   as A operand r by ldmatrix,       as B operands {r[0], r[1]} (columns 0-7 of X) and
//       {r[2], r[3]} (columns 8-15) by ldmatrix_trans;
//   X^T (kTransposed) as A operand r by ldmatrix_trans, as B operands {r[0], r[1]} (columns 0-7 of
//       X^T, which are rows 0-7 of X) and {r[2], r[3]} by ldmatrix.
// From these registers every block of a tile, and of tiles at constant distances, is a constant
// away.
template <int kHeadDim, bool kTransposed, class Layout = Swizzle<kHeadDim>> struct BlockAddress {
  static constexpr int kAddresses = Layout::kAddresses;
  uint32_t at[kAddresses];

  // s_tile: a tile that begins at a multiple of 128 bytes, or a multiple of 8 rows further.
  __device__ BlockAddress(uint32_t s_tile) {
    const int lane = threadIdx.x % 32;
    const int row = kTransposed ? lane % 8 + lane / 16 * 8 : lane % 16;
    const int right = kTransposed ? lane / 8 % 2 : lane / 16;
#pragma unroll
    for (int i = 0; i < kAddresses; i++)
      at[i] = s_tile + Layout::offset(row, 2 * i + right);
  }
  // Of the block whose first row is `row` (a multiple of 8) and whose first column is 16 * column.
  __device__ uint32_t block(int row, int column) const {
    return at[column % kAddresses] + row * Layout::kRowBytes +
           column / kAddresses * kAddresses * 32;
  }
};

// d (16 x 8) = a (16 x 16) b (16 x 8) + c, see ptx.cuh. With c = 0 it costs no register to clear.
template <class T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                    const float (&c)[4]) {
  static_assert(sizeof(T) == 2, "bf16 or f16");
  if constexpr (std::is_same_v<T, bf16>) ptx::mma_m16n8k16_bf16(d, a, b0, b1, c);
  else ptx::mma_m16n8k16_f16(d, a, b0, b1, c);
}
// The same, added to d.
template <class T>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<T>(d, a, b0, b1, d);
}

// Lets a kernel have so many bytes of dynamic shared memory; if not, the next launch_status tells.
template <class Kernel> bool allow_shared_memory(Kernel kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) ==
         cudaSuccess;
}

// Two values rounded to T, the first in the low half.
template <class T> __device__ uint32_t pack(float first, float second) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(both);
  } else {
    const __half2 both = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(both);
  }
}

// Two neighbouring 16 x 8 accumulators, columns 0-7 and 8-15, rounded to T: a 16 x 16 A operand.
template <class T>
__device__ void to_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// The forward's other kernels. attention_decode splits the keys of a few queries, at most
// kMaxDecodeQueries, over blocks; attention_scalar takes every dtype and layout.
constexpr int64_t kMaxDecodeQueries = 16;
inline bool attention_decodes(const Attention& a) { return !a.cu_q && a.T <= kMaxDecodeQueries; }
Status attention_decode(void* o, void* lse, void* partial, const Attention& a, Stream stream);
Status attention_scalar(void* o, void* lse, const Attention& a, Stream stream);

}  // namespace lx
