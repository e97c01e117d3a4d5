// Grouped FP8 GEMMs of the experts for SM90, on CUTLASS's wgmma, TMA and barrier wrappers.
//
// A tile is up to 128 tokens of one expert times 2 x 128 rows of its matrix: gate and up of the same 128 columns, or
// 256 neighbours. A thread block is persistent: one warpgroup loads (weights by TMA; token rows, which lie anywhere, by
// cp.async), two multiply. Each 128 columns of the sum are scaled and added in float32 outside the tensor cores'
// accumulators.
//
// Tiles of this size ask much of the L2 cache, so weights are shared: in a cluster two thread blocks take 128 tokens
// each and the same weights, and either loads half of them and sends it to both. What is left of an expert's tokens,
// 128 or less, both take with weights of their own. Up to 64 tokens both warpgroups work on the same rows, with half
// the columns each: nothing is multiplied for padding but in units of 64 tokens.
//
// Where a sum is so short that all stages together hold it, tiles of the same weights can be taken in runs: the weights
// are loaded for the first one and stay.
#pragma once

#include <cstdint>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <utility>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

namespace moe_dist {

// What is computed: act(gate) * up, act(x), or the second GEMM. How it is scaled: by blocks of 128 x 128 and groups of
// 128; by rows and channels (or matrices); by one static number.
enum Gemm { UP_GATED = 0, UP = 1, DOWN = 2 };
enum Kind { BLOCK = 1, ROW = 2, STATIC = 3 };
enum Activation { SWIGLU = 0, GEGLU = 1, RELU2 = 2 }; // UP is always the last

// One call. P pairs lie sorted by expert, expert e's from starts[e] to stops[e]; pair order[j] belongs to row
// order[j] / top_k. ctypes fills this: keep the order of fields as moe_dist/kernels/cutlass/library.py has it.
struct Args {
  const uint8_t *x;      // UP*: token rows [R, K]; DOWN: [P, K] in the order of the sorted pairs; E4M3
  const float *x_scales; // at row * x_scale_row + k_block * x_scale_k
  const float *w_scales; // as ExpertWeights.s13 or s2
  const float *x_static; // STATIC: UP* one number, DOWN one for each expert
  const float *h_static; // STATIC, UP*: one for each expert, to quantize the output by
  const int *starts;
  const int *stops;
  const int *order;
  int *taken;        // how many tiles were asked for: 0 before a launch and after it
  void *out;         // UP*: [P, width] sorted, E4M3 (ROW: bf16); DOWN: [P, width] bf16, by pair
  float *out_scales; // BLOCK, UP*: [ceil(width / 128), P]
  const int *flags;  // UP*: when rows are here that are on their way (Arrivals of moe_dist/step/rows.py); null: all are
  const int *step;   // this and the others of Arrivals
  int *failed;
  int64_t limit_ns;
  int64_t x_scale_row, x_scale_k;
  int k;          // length of the sum
  int width;      // columns of the output
  int first, end; // DOWN: the columns to compute, from a multiple of 128 on; UP*: 0 and width
  int experts, top_k, pairs;
  int activation, gate_first, per_tensor;
  int each, rank, parts, phase; // of Arrivals; `parts` is how many flags there are
};

constexpr int BLOCK_K = 128;              // bytes of a swizzled row, and columns of a scale block
constexpr int HALF_BYTES = 128 * BLOCK_K; // of weights
constexpr int MATH_THREADS = 256, LOAD_THREADS = 128, THREADS = MATH_THREADS + LOAD_THREADS;
constexpr int STAGED_ROW = 144; // bytes of a token's staged row: 128 and a shift by four banks
constexpr int MOST_SHARED = 232448;

constexpr int TOKENS = 128, UNIT = 64; // of a tile; of one warpgroup's product
constexpr int STAGES = 4;
constexpr int MOST_RUN = 4, FEWEST_RUNS = 16; // tiles of a run; runs of a cluster: of fewer, some would end much later
constexpr int AHEAD = 2;                      // tiles, or runs, that a cluster knows beforehand
constexpr int NUMBERS = 8; // of those that are kept: nobody is further behind the loads than STAGES tiles
constexpr int ALL_MATH = 1, TURNS = 2, ALL_LOADS = 4; // named barriers: TURNS has one for each warpgroup
constexpr int SCALES = TOKENS + 4;                    // of a stage: the tokens', and one for each half of the weights
constexpr int AT_TOKENS = STAGES * 2 * HALF_BYTES;
constexpr int AT_STAGED = AT_TOKENS + STAGES * TOKENS * BLOCK_K;
constexpr int AT_SCALES = AT_STAGED + 2 * UNIT * STAGED_ROW;
constexpr int AT_MAXIMA = AT_SCALES + STAGES * SCALES * 4;
constexpr int AT_BARRIERS = AT_MAXIMA + 2 * UNIT * 4;
constexpr int AT_NUMBERS = AT_BARRIERS + (2 * STAGES + NUMBERS) * 8;
constexpr int AT_TILES = AT_NUMBERS + NUMBERS * 4;
inline int shared_bytes(int experts) { return AT_TILES + (4 * experts + 2) * 4; }

template <int N> struct Mma;
#define MOE_DIST_MMA(N)                                                                                                \
  template <> struct Mma<N> {                                                                                          \
    using Op = cute::SM90::GMMA::MMA_64x##N##x32_F32E4M3E4M3_SS_TN<cute::SM90::GMMA::ScaleIn::One,                     \
                                                                   cute::SM90::GMMA::ScaleIn::One>;                    \
  };
MOE_DIST_MMA(64)
MOE_DIST_MMA(128)
#undef MOE_DIST_MMA

__device__ inline uint32_t shared_address(const void *p) { return cute::cast_smem_ptr_to_uint(p); }

__device__ inline void copy_16(uint32_t to, const void *from, int bytes) { // the rest of the 16 becomes 0
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void copy_4(uint32_t to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// One store of 16 bytes. As an assignment the compiler may make four of it, which took GEMM2 3 to 15 % longer.
__device__ inline void put_16(void *to, uint4 value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

__device__ inline uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

__device__ inline int seen(const int *flag) { // what its writer wrote before is seen from here on
  int value;
  asm volatile("ld.acquire.sys.global.b32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ inline void meet(int id) { // of the math warpgroups
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(MATH_THREADS) : "memory");
}

__device__ inline void pass(int id) { // to those who wait there
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(MATH_THREADS) : "memory");
}

// A K-major operand of 128-byte rows under the 128-byte swizzle: 1024 bytes from 8 rows to the next 8.
__device__ inline uint64_t operand(const uint8_t *shared) {
  return (uint64_t(1) << 62) | (uint64_t(1024 >> 4) << 32) | (uint64_t(1) << 16) | (shared_address(shared) >> 4);
}

template <int N, int... I>
__device__ inline void multiply(uint64_t a, uint64_t b, float (&d)[N / 2], bool add, std::integer_sequence<int, I...>) {
  using cute::SM90::GMMA::ScaleOut;
  Mma<N>::Op::fma(a, b, d[I]..., add ? ScaleOut::One : ScaleOut::Zero);
}

// d = 64 tokens x N rows of weights over 128 columns of the sum: there after `finished`. The two warpgroups take turns:
// else their products would run at the same time, both twice as long, and then their additions, with the tensor cores
// idle.
template <int N> __device__ inline void start_product(uint64_t a, uint64_t b, float (&d)[N / 2], int group) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    cute::warpgroup_fence_operand(d[i]);
  meet(TURNS + group);
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < BLOCK_K / 32; ++k)
    multiply<N>(a + k * 2, b + k * 2, d, k != 0, std::make_integer_sequence<int, N / 2>{});
  cute::warpgroup_commit_batch();
  pass(TURNS + (group ^ 1));
}

template <int N> __device__ inline void finished(float (&d)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i)
    cute::warpgroup_fence_operand(d[i]);
  cute::warpgroup_wait<0>();
}

// A thread has rows lane / 4 + {0, 8} of its warp's 16 in d[4j + {0, 1}] and d[4j + {2, 3}], columns 8j + 2 (lane % 4)
// + {0, 1}.
template <int N>
__device__ inline void add_scaled(float (&total)[N / 2], const float (&d)[N / 2], float upper, float lower) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    total[4 * j] += d[4 * j] * upper;
    total[4 * j + 1] += d[4 * j + 1] * upper;
    total[4 * j + 2] += d[4 * j + 2] * lower;
    total[4 * j + 3] += d[4 * j + 3] * lower;
  }
}

__device__ inline float swiglu(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

__device__ inline float geglu(float gate, float up) { // 0.5 (1 + tanh z) = sigmoid(2 z)
  const float z = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
  return __fdividef(gate, 1.0f + __expf(-2.0f * z)) * up;
}

__device__ inline float relu2(float x) { return x <= 0.0f ? 0.0f : x * x; } // NaN stays

// Which tiles there are. Of an expert's n tokens a cluster takes 2 x 128 at a time, and 129 to 255 that are left in two
// halves; 128 or less are left to tiles in which its blocks have different columns. An expert's tiles of one column
// come one after the other, then its next column: what is at work at a time shares weights and tokens in L2.
// Some tiles take half as long as others, so clusters take them as they come.
//
// While rows are on their way, every expert's first tokens are a wave of their own before all others. They are sorted
// by row, and the first rows are here already.
//
// With RUNS a number is that of up to `run` tiles of the same weights, which a cluster takes one after the other.
template <int CLUSTER, bool WAVES, bool RUNS> struct Tiles {
  static_assert(!WAVES || !RUNS);
  int *before, *start, *count, *ahead; // [experts + 1] tiles before an expert; [experts]; before, in the first wave
  int run = 1, more = 0;               // with RUNS: tiles at a time; how many come after this one
  int experts, columns, expert = 0;
  int early = 0; // tiles of the first wave
  bool later = false;
  int at;                    // with RUNS: the cluster's first token, of the expert's
  int column, first, tokens; // of this thread block: its first token, of the expert's; how many
  bool shared;               // whether the cluster's blocks have the same weights

  __device__ Tiles(int *room, int experts, int columns)
      : before(room), start(room + experts + 1), count(start + experts), ahead(count + experts), experts(experts),
        columns(columns) {}

  static constexpr int TOGETHER = CLUSTER * TOKENS;
  __device__ static int full_tiles(int n) { // in a column
    return CLUSTER == 1 ? (n + TOKENS - 1) / TOKENS : n / TOGETHER + (n % TOGETHER > TOKENS);
  }
  __device__ int numbers(int n) const { // of its full tiles, in a column
    return RUNS ? (full_tiles(n) + run - 1) / run : full_tiles(n);
  }
  __device__ int split_tiles(int n) const { // in all columns
    return CLUSTER == 1 || n % TOGETHER == 0 || n % TOGETHER > TOKENS ? 0 : (columns + 1) / 2;
  }

  __device__ int first_tiles(int n) const { return full_tiles(n) > 0 ? columns : 0; } // of an expert in the first wave

  __device__ void find(const int *starts, const int *stops) { // by all threads
    for (int e = threadIdx.x; e < experts; e += THREADS) {
      start[e] = starts[e];
      count[e] = stops[e] - starts[e];
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      int total = 0;
      if constexpr (WAVES)
        total = add_up(ahead, total, [&](int n) { return first_tiles(n); });
      if constexpr (RUNS) {
        const int all = add_up(before, 0, [&](int n) { return full_tiles(n) * columns; });
        run = max(1, min(MOST_RUN, all / (int(gridDim.x) / CLUSTER * FEWEST_RUNS)));
        if (threadIdx.x == 0)
          ahead[0] = run;
        __syncwarp();
      }
      add_up(before, total,
             [&](int n) { return numbers(n) * columns + split_tiles(n) - (WAVES ? first_tiles(n) : 0); });
    }
    __syncthreads();
    early = WAVES ? ahead[experts] : 0;
    if constexpr (RUNS)
      run = ahead[0];
  }

  // to[e] = total + the tiles of all experts before e; by one warp, which gets to[experts].
  template <class F> __device__ int add_up(int *to, int total, F tiles_of) const {
    for (int at = 0; at < experts; at += 32) {
      const int e = at + int(threadIdx.x);
      const int tiles = e < experts ? tiles_of(count[e]) : 0;
      int sum = tiles;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (int(threadIdx.x) >= step)
          sum += other;
      }
      if (e < experts)
        to[e] = total + sum - tiles;
      total += __shfl_sync(~0u, sum, 31);
    }
    if (threadIdx.x == 0)
      to[experts] = total;
    return total;
  }

  __device__ bool is(int number) { // numbers only grow
    const bool first_wave = WAVES && number < early;
    if (WAVES && !first_wave && !later)
      later = true, expert = 0;
    const int *begins = first_wave ? ahead : before;
    while (expert < experts && number >= begins[expert + 1])
      ++expert;
    if (expert == experts)
      return false;
    const int n = count[expert], all = full_tiles(n), within = number - begins[expert];
    const int done = WAVES && !first_wave && all > 0; // of the full ones, in the first wave
    const int full = first_wave ? 1 : numbers(n) - done;
    const int rank = int(blockIdx.x) % CLUSTER;
    shared = within < full * columns;
    if (shared) {
      column = within / full;
      const int tile = (done + within % full) * (RUNS ? run : 1);
      if constexpr (RUNS)
        more = min(run, all - tile) - 1;
      begin(tile * TOGETHER, n);
    } else {
      more = 0;
      column = (within - full * columns) * 2 + rank;
      first = all * TOGETHER;
      tokens = column < columns ? n - first : 0;
    }
    return true;
  }

  __device__ bool again() { // the next tile of this run
    if (!RUNS || more == 0)
      return false;
    --more;
    begin(at + TOGETHER, count[expert]);
    return true;
  }

  __device__ void begin(int from, int n) { // this block's tokens of the cluster's, which begin there
    const int left = n - from, rank = int(blockIdx.x) % CLUSTER;
    const int each = CLUSTER == 1 || left >= TOGETHER ? TOKENS : (left + 1) / 2;
    if constexpr (RUNS)
      at = from;
    first = from + rank * each;
    tokens = min(each, n - first);
  }
};

// The parity of each stage's next use. A tile begins with stage 0 whatever the one before ended with.
struct Parities {
  uint32_t bits = 0;
  __device__ uint32_t take(int stage) {
    const uint32_t parity = bits >> stage & 1;
    bits ^= 1u << stage;
    return parity;
  }
};

// VARIANT, of GEMM1: rows are on their way. A kernel of its own, since what waits and what counts waves took GEMM1 2 %
// longer where nothing was waited for. Of GEMM2, whose sum is no longer than the stages: tiles come in runs.
template <int GEMM, int KIND, int CLUSTER, bool VARIANT> struct Kernel {
  static constexpr bool ARRIVING = GEMM != DOWN && VARIANT, RUNS = GEMM == DOWN && VARIANT;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  using Tile = Tiles<CLUSTER, ARRIVING, RUNS>;
  static constexpr int COLUMNS = GEMM == UP_GATED ? 128 : 256; // of the output in a tile

  const Args &args;
  uint8_t *shared;
  int wide = (args.k + BLOCK_K - 1) / BLOCK_K;

  __device__ Barrier *full(int stage) const { return reinterpret_cast<Barrier *>(shared + AT_BARRIERS) + stage; }
  __device__ Barrier *empty(int stage) const { return full(STAGES + stage); }
  __device__ Barrier *told(int at) const { return full(2 * STAGES + at); }
  __device__ int *numbers() const { return reinterpret_cast<int *>(shared + AT_NUMBERS); }
  __device__ float *scales(int stage) const { return reinterpret_cast<float *>(shared + AT_SCALES) + stage * SCALES; }
  __device__ float *maxima() const { return reinterpret_cast<float *>(shared + AT_MAXIMA); } // [2 warpgroups, 64]

  // The weights' half 0 is gate's, or the first 128 of 256 columns.
  __device__ int place(int half) const { return half == (args.gate_first ? 0 : 1) ? 0 : 1; }
  __device__ int matrix_row(const Tile &tile, int half) const {
    if constexpr (GEMM == UP_GATED)
      return (tile.expert * 2 + place(half)) * args.width + tile.column * 128;
    return tile.expert * args.width + args.first + tile.column * 256 + half * 128;
  }
  __device__ const float *block_scales(const Tile &tile, int half) const {
    int blocks = (args.width + 127) / 128;
    if constexpr (GEMM == UP_GATED)
      return args.w_scales + int64_t((tile.expert * 2 + place(half)) * blocks + tile.column) * wide;
    return args.w_scales +
           int64_t(tile.expert * blocks + min(args.first / 128 + tile.column * 2 + half, blocks - 1)) * wide;
  }
  __device__ float channel_scale(const Tile &tile, int half, int channel) const {
    constexpr int HALVES = GEMM == UP_GATED ? 2 : 1;
    int matrix = tile.expert * HALVES + (GEMM == UP_GATED ? place(half) : 0);
    if (args.per_tensor)
      return args.w_scales[matrix];
    return channel < args.width ? args.w_scales[int64_t(matrix) * args.width + channel] : 0.0f;
  }

  __device__ int source(const Tile &tile, int token) const {
    int at = tile.start[tile.expert] + tile.first + token;
    return GEMM == DOWN ? at : int(uint32_t(args.order[at]) / uint32_t(args.top_k));
  }

  // This cluster's next tile: the first AHEAD by its own number, the others as its first block was told.
  __device__ bool next(Tile &tile, int round) const {
    int number = int(blockIdx.x) / CLUSTER + round * (int(gridDim.x) / CLUSTER);
    if (round >= AHEAD)
      number = hear(round - AHEAD);
    return tile.is(number);
  }

  __device__ int hear(int told_in_round) const {
    const int at = told_in_round % NUMBERS;
    told(at)->wait(told_in_round / NUMBERS & 1);
    return *const_cast<const volatile int *>(numbers() + at);
  }

  // To this cluster's blocks the number that comes after `taken` others. In a cluster of two it goes as bytes that the
  // barriers count: an order by fences would wait for all loads. Each tile asks once: the last leaves 0.
  __device__ void tell(const Tile &tile, int round, int taken) const {
    if (taken == tile.before[args.experts] - 1)
      atomicExch(args.taken, 0);
    const int number = taken + AHEAD * (int(gridDim.x) / CLUSTER), at = round % NUMBERS;
    if constexpr (CLUSTER == 1) {
      *const_cast<volatile int *>(numbers() + at) = number;
      told(at)->arrive();
    } else {
#pragma unroll
      for (int rank = 0; rank < CLUSTER; ++rank)
        asm volatile("{\n"
                     ".reg .b32 to, barrier;\n"
                     "mapa.shared::cluster.u32 to, %0, %3;\n"
                     "mapa.shared::cluster.u32 barrier, %1, %3;\n"
                     "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [to], %2, [barrier];\n"
                     "}\n" ::"r"(shared_address(numbers() + at)),
                     "r"(shared_address(told(at))), "r"(number), "r"(rank)
                     : "memory");
    }
  }

  // Until the rows of this tile are here. They are sorted, so the last token's part is the latest one. `here`: the last
  // part that is known to be here.
  __device__ void await(const Tile &tile, int &here) const {
    if (tile.tokens <= 0)
      return;
    const int part = source(tile, tile.tokens - 1) / args.each;
    if (part <= here)
      return;
    if (threadIdx.x == MATH_THREADS) {
      const int number = *args.step + 1;
      const uint64_t began = nanoseconds();
      while (here < part) {
        if (seen(args.flags + here + 1) == number) {
          ++here;
        } else if (int64_t(nanoseconds() - began) > args.limit_ns) {
          args.failed[1] = (args.rank + here + 1) % args.parts;
          args.failed[2] = number;
          __threadfence_system();
          args.failed[0] = args.phase + 1;
          here = part;
        }
      }
    }
    asm volatile("bar.sync %0, %1;" ::"n"(ALL_LOADS), "n"(LOAD_THREADS) : "memory");
    here = part;
  }

  __device__ void load(Tile &tile, const CUtensorMap *weights) const {
    constexpr int PASSES = TOKENS / 16; // 16 rows of 8 x 16 bytes each
    const int thread = int(threadIdx.x) - MATH_THREADS, chunk = thread % 8;
    const uint32_t rank = blockIdx.x % CLUSTER;
    const uint32_t to = uint32_t(thread / 8 * 128 + ((chunk ^ (thread / 8 % 8)) * 16));
    Parities parities;
    int round = 0, here = 0;
    for (; next(tile, round); ++round) {
      int taken = 0;
      if (thread == 0) {
        if (rank == 0)
          taken = atomicAdd(args.taken, 1); // there long before it is told
        if (CLUSTER > 1)
          told(round % NUMBERS)->arrive_and_expect_tx(sizeof(int));
      }
      if constexpr (ARRIVING)
        await(tile, here);
      bool there = false; // the weights, which came with an earlier tile of this run
      do {
        const uint8_t *rows[PASSES];
#pragma unroll
        for (int i = 0; i < PASSES; ++i) {
          int token = i * 16 + thread / 8;
          rows[i] = token < tile.tokens ? args.x + int64_t(source(tile, token)) * args.k + chunk * 16 : nullptr;
        }
        const float *of_token = nullptr, *of_weights = nullptr;
        if (KIND != STATIC && thread < tile.tokens)
          of_token = args.x_scales + source(tile, thread) * args.x_scale_row;
        // Without tokens the column may lie beyond the last.
        if (KIND == BLOCK && thread < 2 && tile.tokens > 0 && !there)
          of_weights = block_scales(tile, thread);
        const int row0 = matrix_row(tile, 0), row1 = matrix_row(tile, 1);
        for (int block = 0; block < wide; ++block) {
          const int stage = block % STAGES;
          empty(stage)->wait(parities.take(stage) ^ 1);
          uint64_t *barrier = reinterpret_cast<uint64_t *>(full(stage));
          if (RUNS && there && thread == 0) {
            full(stage)->arrive();
          } else if (thread == 0) {
            full(stage)->arrive_and_expect_tx(2 * HALF_BYTES);
            uint8_t *halves = shared + stage * 2 * HALF_BYTES;
            const uint64_t hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
            if (CLUSTER == 2 && tile.shared) {
              cute::SM90_TMA_LOAD_MULTICAST_2D::copy(weights, barrier, uint16_t(3), hint, halves + rank * HALF_BYTES,
                                                     block * BLOCK_K, rank ? row1 : row0);
            } else {
              cute::SM90_TMA_LOAD_2D::copy(weights, barrier, hint, halves, block * BLOCK_K, row0);
              cute::SM90_TMA_LOAD_2D::copy(weights, barrier, hint, halves + HALF_BYTES, block * BLOCK_K, row1);
            }
          }
          const uint32_t tokens = shared_address(shared + AT_TOKENS + stage * TOKENS * BLOCK_K) + to;
          const int inside = block * BLOCK_K + chunk * 16 < args.k ? 16 : 0;
#pragma unroll
          for (int i = 0; i < PASSES; ++i)
            if (rows[i])
              copy_16(tokens + i * 2048, inside ? rows[i] + block * BLOCK_K : rows[i], inside);
          const uint32_t factors = shared_address(scales(stage));
          if (of_token)
            copy_4(factors + thread * 4, of_token + block * args.x_scale_k);
          if (of_weights)
            copy_4(factors + (TOKENS + thread) * 4, of_weights + block);
          cutlass::arch::cpasync_barrier_arrive_noinc(barrier);
        }
        if (thread == 0 && rank == 0 && !there)
          tell(tile, round, taken);
        there = true;
      } while (tile.again());
    }
    if (round > 0)
      hear(round - 1); // nobody goes while bytes are on their way to its shared memory
  }

  __device__ void release(int stage) const { // by a whole warp that is done with a stage, to the blocks that fill it
    __syncwarp();
    if (threadIdx.x % 32 < CLUSTER)
      empty(stage)->arrive(threadIdx.x % 32);
  }

  __device__ void work(Tile &tile) const {
    Parities parities;
    if (threadIdx.x >= 128)
      pass(TURNS); // the first turn is the first warpgroup's
    for (int round = 0; next(tile, round); ++round) {
      do {
        if (tile.tokens > UNIT) {
          work_on<128>(tile, parities);
        } else if (tile.tokens > 0) {
          work_on<64>(tile, parities);
        } else {
          for (int block = 0; block < wide; ++block) {
            full(block % STAGES)->wait(parities.take(block % STAGES));
            release(block % STAGES);
          }
        }
      } while (tile.again());
    }
  }

  // N = 128: 64 tokens by each warpgroup; N = 64: half of the columns by each.
  template <int N> __device__ void work_on(const Tile &tile, Parities &parities) const {
    const int group = __shfl_sync(~0u, int(threadIdx.x) / 128, 0), my_unit = N == 128 ? group : 0;
    const uint64_t a0 = operand(shared + AT_TOKENS + my_unit * UNIT * BLOCK_K);
    const uint64_t b0 = operand(shared + (N == 128 ? 0 : group * 64 * BLOCK_K));
    const int row = my_unit * UNIT + int(threadIdx.x) % 128 / 32 * 16 + int(threadIdx.x) % 32 / 4;
    // The output's row of one of this warp's tokens: asked for now, to be there in the end.
    const int mine = first_row<N>() + int(threadIdx.x) % 16, sorted = tile.start[tile.expert] + tile.first + mine;
    const int target = mine >= tile.tokens ? 0 : GEMM == DOWN ? args.order[sorted] : sorted;
    float left[N / 2] = {}, right[N / 2] = {};
    for (int block = 0; block < wide; ++block) {
      const int stage = __shfl_sync(~0u, block % STAGES, 0); // in a uniform register, as descriptors want it
      const uint64_t a = a0 + stage * (TOKENS * BLOCK_K >> 4), b = b0 + stage * (2 * HALF_BYTES >> 4);
      const float *factors = scales(stage);
      float upper = 1.0f, lower = 1.0f, d[N / 2];
      float2 of_weights = {1.0f, 1.0f};
      full(stage)->wait(parities.take(stage));
      cutlass::arch::fence_view_async_shared(); // what cp.async wrote is to be read by wgmma
      start_product<N>(a, b, d, group);
      if constexpr (KIND != STATIC)
        upper = factors[row], lower = factors[row + 8];
      if constexpr (KIND == BLOCK)
        of_weights = *reinterpret_cast<const float2 *>(factors + TOKENS);
      finished<N>(d);
      add_scaled<N>(left, d, upper * of_weights.x, lower * of_weights.x);
      start_product<N>(a, b + (HALF_BYTES >> 4), d, group);
      finished<N>(d);
      release(stage);
      add_scaled<N>(right, d, upper * of_weights.y, lower * of_weights.y);
    }
    finish<N>(tile, left, right, target);
  }

  template <int N>
  __device__ void finish(const Tile &tile, float (&left)[N / 2], float (&right)[N / 2], int target) const {
    // This thread's first column of the left half, and of the output.
    const int at = (N == 128 ? 0 : int(threadIdx.x) / 128 * 64) + int(threadIdx.x) % 4 * 2;
    const int channel = (GEMM == DOWN ? args.first : 0) + tile.column * COLUMNS + at;
    if constexpr (KIND != BLOCK) {
      float all = 1.0f;
      if constexpr (KIND == STATIC)
        all = args.x_static[GEMM == DOWN ? tile.expert : 0];
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float of_left = all * channel_scale(tile, 0, channel + 8 * j + i);
          const float of_right = all * channel_scale(tile, 1, channel + 8 * j + i + (GEMM == UP_GATED ? 0 : 128));
          left[4 * j + i] *= of_left, left[4 * j + 2 + i] *= of_left;
          right[4 * j + i] *= of_right, right[4 * j + 2 + i] *= of_right;
        }
    }
    if constexpr (GEMM == UP_GATED) {
      if (args.activation == SWIGLU) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
          left[i] = swiglu(left[i], right[i]);
      } else {
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
          left[i] = geglu(left[i], right[i]);
      }
      if (tile.column * 128 + 128 > args.width) { // what is beyond must not count in the scales
#pragma unroll
        for (int i = 0; i < N / 2; ++i)
          if (channel + i / 4 * 8 + i % 2 >= args.width)
            left[i] = 0.0f;
      }
      put<N>(tile, left, tile.column * 128, target);
    } else {
      if constexpr (GEMM == UP) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          const int here = channel + i / 4 * 8 + i % 2;
          left[i] = here < args.width ? relu2(left[i]) : 0.0f;
          right[i] = here + 128 < args.width ? relu2(right[i]) : 0.0f;
        }
      }
      const int column = args.first + tile.column * 256;
      put<N>(tile, left, column, target);
      if (column + 128 < args.end)
        put<N>(tile, right, column + 128, target);
    }
  }

  // 128 columns of the output from `channel` on: of 64 tokens by each warpgroup, or 64 columns of the same by each.
  template <int N> __device__ void put(const Tile &tile, const float (&values)[N / 2], int channel, int target) const {
    const int group = int(threadIdx.x) / 128, lane = int(threadIdx.x) % 32, first = first_row<N>();
    const Place place = {
        shared + AT_STAGED + int(threadIdx.x) / 32 * 16 * STAGED_ROW,
        tile.start[tile.expert] + tile.first + first,
        max(0, min(16, tile.tokens - first)),
        channel + (N == 128 ? 0 : group * 64),
        lane / 4,
    };
    if constexpr (GEMM == DOWN || KIND == ROW) {
      put_bf16<N>(place, values, target);
    } else {
      float upper, lower;
      if constexpr (KIND == STATIC)
        upper = lower = args.h_static[tile.expert];
      else
        group_scales<N>(values, upper, lower);
      if (KIND == BLOCK && lane % 4 == 0 && (N == 128 || group == 0)) {
        float *out = args.out_scales + int64_t(channel / 128) * args.pairs + place.first;
        if (place.row < place.tokens)
          out[place.row] = upper;
        if (place.row + 8 < place.tokens)
          out[place.row + 8] = lower;
      }
      put_codes<N>(place, values, upper, lower);
    }
  }

  // The first of this warp's 16 tokens of the tile.
  template <int N> __device__ static int first_row() {
    return (N == 128 ? int(threadIdx.x) / 32 : int(threadIdx.x) % 128 / 32) * 16;
  }

  struct Place { // one warp's part of a tile: nobody else has to be waited for
    uint8_t *staged;
    int first, tokens; // of the sorted pairs
    int channel;
    int row; // this thread's, of 16; and the one 8 further
  };

  // The scales of two tokens' 128 columns, of which a quad of threads has all or, with N = 64, half.
  template <int N> __device__ void group_scales(const float (&values)[N / 2], float &upper, float &lower) const {
    upper = lower = 0.0f;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      upper = fmaxf(upper, fmaxf(fabsf(values[4 * j]), fabsf(values[4 * j + 1])));
      lower = fmaxf(lower, fmaxf(fabsf(values[4 * j + 2]), fabsf(values[4 * j + 3])));
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      upper = fmaxf(upper, __shfl_xor_sync(~0u, upper, step));
      lower = fmaxf(lower, __shfl_xor_sync(~0u, lower, step));
    }
    if constexpr (N == 64) {
      const int group = int(threadIdx.x) / 128, row = first_row<N>() + int(threadIdx.x) % 32 / 4;
      meet(ALL_MATH); // what was there has been read
      if (threadIdx.x % 4 == 0)
        maxima()[group * UNIT + row] = upper, maxima()[group * UNIT + row + 8] = lower;
      meet(ALL_MATH);
      upper = fmaxf(upper, maxima()[(group ^ 1) * UNIT + row]);
      lower = fmaxf(lower, maxima()[(group ^ 1) * UNIT + row + 8]);
    }
    upper = fmaxf(__fdiv_rn(upper, 448.0f), TINY);
    lower = fmaxf(__fdiv_rn(lower, 448.0f), TINY);
  }
  static constexpr float TINY = 1e-12f;

  template <int N>
  __device__ void put_codes(const Place &place, const float (&values)[N / 2], float upper, float lower) const {
    const int lane = int(threadIdx.x) % 32;
    const float of_upper = __frcp_rn(upper), of_lower = __frcp_rn(lower);
    __syncwarp(); // what was staged has been copied out
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      uint8_t *to = place.staged + place.row * STAGED_ROW + 8 * j + lane % 4 * 2;
      *reinterpret_cast<uint16_t *>(to) = codes(values[4 * j], values[4 * j + 1], upper, of_upper);
      *reinterpret_cast<uint16_t *>(to + 8 * STAGED_ROW) = codes(values[4 * j + 2], values[4 * j + 3], lower, of_lower);
    }
    __syncwarp();
    constexpr int CHUNKS = N / 16; // of 16 bytes
    const int at = lane % CHUNKS * 16;
    uint8_t *out = static_cast<uint8_t *>(args.out) + int64_t(place.first) * args.width + place.channel + at;
    if (place.channel + at < args.width)
#pragma unroll
      for (int row = lane / CHUNKS; row < 16; row += 32 / CHUNKS)
        if (row < place.tokens)
          put_16(out + int64_t(row) * args.width,
                 *reinterpret_cast<const uint4 *>(place.staged + row * STAGED_ROW + at));
  }

  // Two quotients by one scale, rounded as division rounds: a product with the reciprocal and one correction (Markstein
  // 1990). The codes must be torch's, ties included. Values beyond FP8's range saturate.
  __device__ static uint16_t codes(float low, float high, float scale, float inverse) {
    return __nv_cvt_float2_to_fp8x2({divided(low, scale, inverse), divided(high, scale, inverse)}, __NV_SATFINITE,
                                    __NV_E4M3);
  }
  __device__ static float divided(float value, float scale, float inverse) {
    const float quotient = value * inverse;
    const float corrected = __fmaf_rn(__fmaf_rn(-quotient, scale, value), inverse, quotient);
    return fabsf(quotient) <= 3.0e38f ? corrected : quotient; // an infinite one has no correction
  }

  template <int N> __device__ void put_bf16(const Place &place, const float (&values)[N / 2], int target) const {
    const int lane = int(threadIdx.x) % 32, at = lane % 8 * 8;
    __nv_bfloat16 *out = static_cast<__nv_bfloat16 *>(args.out) + place.channel + at;
#pragma unroll
    for (int column = 0; column < N; column += 64) { // what is staged at a time
      __syncwarp();
#pragma unroll
      for (int j = column / 8; j < column / 8 + 8; j += 2) {
        const int to_column = (j - column / 8 + lane / 16) * 8;
        const uint32_t to = shared_address(place.staged + lane % 16 * STAGED_ROW + to_column * 2);
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                     "r"(pair(values[4 * j], values[4 * j + 1])), "r"(pair(values[4 * j + 2], values[4 * j + 3])),
                     "r"(pair(values[4 * j + 4], values[4 * j + 5])), "r"(pair(values[4 * j + 6], values[4 * j + 7]))
                     : "memory");
      }
      __syncwarp();
      uint4 chunks[4];
      __nv_bfloat16 *to[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) { // all read before the first is written: nothing waits but once
        const int row = i * 4 + lane / 8;
        chunks[i] = *reinterpret_cast<const uint4 *>(place.staged + row * STAGED_ROW + at * 2);
        to[i] = out + int64_t(__shfl_sync(~0u, target, row)) * args.width + column;
      }
      if (place.channel + column + at < args.end)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i * 4 + lane / 8 < place.tokens)
            put_16(to[i], chunks[i]);
    }
  }

  __device__ static uint32_t pair(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&both);
  }
};

template <int GEMM, int KIND, int CLUSTER, bool VARIANT>
__global__ void __launch_bounds__(THREADS, 1)
    grouped_gemm(const __grid_constant__ Args args, const __grid_constant__ CUtensorMap weights) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t shared[];
  Kernel<GEMM, KIND, CLUSTER, VARIANT> kernel{args, shared};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      kernel.full(stage)->init(1 + LOAD_THREADS);
      kernel.empty(stage)->init(CLUSTER * MATH_THREADS / 32);
    }
    for (int number = 0; number < NUMBERS; ++number)
      kernel.told(number)->init(1);
    cutlass::arch::fence_barrier_init();
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  typename decltype(kernel)::Tile tile(reinterpret_cast<int *>(shared + AT_TILES), args.experts,
                                       (args.end - args.first + kernel.COLUMNS - 1) / kernel.COLUMNS);
  tile.find(args.starts, args.stops);
  if constexpr (CLUSTER > 1) { // barriers that the other block arrives at must be there
    cute::cluster_arrive();
    cute::cluster_wait();
  }
  if (threadIdx.x >= MATH_THREADS) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    kernel.load(tile, &weights);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    kernel.work(tile);
  }
  if constexpr (CLUSTER > 1) { // nor may they go while it does
    cute::cluster_arrive();
    cute::cluster_wait();
  }
#endif
}

// On `sms` multiprocessors; a CUDA error code.
template <int GEMM, int KIND, int CLUSTER, bool VARIANT>
int launch(const Args &args, const CUtensorMap &weights, int sms, bool early, cudaStream_t stream) {
  if (GEMM == DOWN && VARIANT && args.k > STAGES * BLOCK_K)
    return cudaErrorInvalidValue;
  auto kernel = grouped_gemm<GEMM, KIND, CLUSTER, VARIANT>;
  const int bytes = shared_bytes(args.experts);
  if (bytes > MOST_SHARED)
    return cudaErrorInvalidValue;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MOST_SHARED);
  if (error != cudaSuccess)
    return error;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = CLUSTER;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(sms / CLUSTER * CLUSTER);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = early ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args, weights);
}

} // namespace moe_dist
