// What the CPU's kernels share: one matrix product over strided operands, vectors, and XLA's threads.
//
// `multiply` computes ROWS × COLS tiles in registers from a right operand that `pack` has laid out in panels of COLS
// columns. Work is cut into tasks for XLA's threads; every number is summed by one of them in one order, so results do
// not depend on how many there are. Vectors are the compiler's, so it builds for any processor.
#pragma once
#define _GNU_SOURCE
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

// A tile's sums are 2 · ROWS vectors. With two of the right operand and one of the left they must fit the registers:
// 27 of 32, or 15 of 16. A vector wider than a register would be spilled in every step, six times slower than no kernel.
#if defined __AVX512F__
#define LANES 16
#define ROWS 12
#elif defined __AVX2__
#define LANES 8
#define ROWS 6
#elif defined __aarch64__
#define LANES 4
#define ROWS 12
#else
#define LANES 4
#define ROWS 6
#endif
enum { COLS = 2 * LANES, FEW = 48, CHUNK = 192, KEPT = 1 << 20 };
typedef float vf __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4)));

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }
static inline int64_t whole(int64_t n) { return pieces(n, COLS) * COLS; }

// n numbers for a task, whose thread keeps them for its next one unless they are many.
static __thread float *kept_numbers;
static float *borrow(int64_t n) {
  if (n > KEPT) return aligned_alloc(64, (size_t)pieces(n, 16) * 64);
  if (kept_numbers == NULL) kept_numbers = aligned_alloc(64, KEPT * sizeof(float));
  return kept_numbers;
}
static void give_back(float *numbers) {
  if (numbers != kept_numbers) free(numbers);
}

// ---- the product ----

// Two vectors woven into each other, a0 b0 a1 b1 …: its first half and its second.
#define PAIRS_4(i) i, i + LANES, i + 1, i + 1 + LANES
#define PAIRS_8(i) PAIRS_4(i), PAIRS_4(i + 2)
#define PAIRS_16(i) PAIRS_8(i), PAIRS_8(i + 4)
#define PAIRS_OF(lanes, i) PAIRS_##lanes(i)
#define PAIRS(lanes, i) PAIRS_OF(lanes, i)
static inline vf weave(vf a, vf b, int second) {
#ifdef __clang__
  return second ? __builtin_shufflevector(a, b, PAIRS(LANES, LANES / 2)) : __builtin_shufflevector(a, b, PAIRS(LANES, 0));
#else
  return second ? __builtin_shuffle(a, b, (vi){PAIRS(LANES, LANES / 2)}) : __builtin_shuffle(a, b, (vi){PAIRS(LANES, 0)});
#endif
}

// to[i][j] = b[j][i] for LANES × LANES numbers: log2(LANES) times each row is woven with the one half of them on.
static void turn(float *to, int64_t ldto, const float *b, int64_t ldb) {
  vf x[LANES], y[LANES];
  for (int i = 0; i < LANES; i++) x[i] = *(const vf *)(b + i * ldb);
#pragma GCC unroll 4
  for (int woven = 1; woven < LANES; woven *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) {
      y[2 * i] = weave(x[i], x[i + LANES / 2], 0);
      y[2 * i + 1] = weave(x[i], x[i + LANES / 2], 1);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = y[i];
  }
  for (int i = 0; i < LANES; i++) *(vf *)(to + i * ldto) = x[i];
}

// Panels of b (k × n, element (i, j) at b[i·rs + j·cs], one of the strides 1): panel p holds its COLS columns as
// [k][COLS], zero-padded; the next one begins `tall` ≥ k rows further on.
static void pack(float *to, const float *b, int64_t rs, int64_t cs, int64_t k, int64_t n, int64_t tall) {
  for (int64_t j0 = 0; j0 < n; j0 += COLS, to += tall * COLS) {
    int64_t width = least(COLS, n - j0);
    if (width < COLS) memset(to, 0, (size_t)(k * COLS) * sizeof(float));
    if (cs == 1 && width == COLS) {  // a size that the compiler knows
      for (int64_t i = 0; i < k; i++) memcpy(to + i * COLS, b + i * rs + j0, COLS * sizeof(float));
    } else if (cs == 1) {
      for (int64_t i = 0; i < k; i++) memcpy(to + i * COLS, b + i * rs + j0, (size_t)width * sizeof(float));
    } else {
      for (int64_t i0 = 0; i0 < k; i0 += LANES)
        for (int64_t j = 0; j < width; j += LANES) {
          const float *from = b + i0 + (j0 + j) * cs;
          if (i0 + LANES <= k && j + LANES <= width) turn(to + i0 * COLS + j, COLS, from, cs);
          else
            for (int64_t l = 0; l < least(LANES, width - j); l++)
              for (int64_t i = 0; i < least(LANES, k - i0); i++) to[(i0 + i) * COLS + j + l] = from[i + l * cs];
        }
    }
  }
}

// c (rows × width) = or += a (rows × k) · one panel; element (i, l) of a at a[i·rs + l·cs], a panel's rows `step` apart.
static inline __attribute__((always_inline)) void tile(const int rows, const float *a, int64_t rs, int64_t cs, int64_t k,
                                                       const float *panel, int64_t step, float *c, int64_t ld, int64_t width,
                                                       int add) {
  vf sum[ROWS][2];
#pragma GCC unroll 12
  for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (vf){0};
  for (int64_t l = 0; l < k; l++, panel += step) {
    vf b0 = *(const vf *)panel, b1 = *(const vf *)(panel + LANES);
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
      float x = a[i * rs + l * cs];
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; i++) {
    float *row = c + i * ld;
    if (width == COLS) {
      vf *to = (vf *)row;
      to[0] = add ? to[0] + sum[i][0] : sum[i][0];
      to[1] = add ? to[1] + sum[i][1] : sum[i][1];
    } else {
      for (int64_t j = 0; j < width; j++) {
        float x = sum[i][j / LANES][j % LANES];
        row[j] = add ? row[j] + x : x;
      }
    }
  }
}

#define TILE(n) \
  case n: tile(n, a, rs, cs, k, panel, step, c, ld, width, add); break;
static void any_tile(int rows, const float *a, int64_t rs, int64_t cs, int64_t k, const float *panel, int64_t step,
                     float *c, int64_t ld, int64_t width, int add) {
  switch (rows) {
    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if ROWS == 12
    TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
  }
}

// c (m × n) = or += a (m × k) · b (k × n), b packed for `packed_k` ≥ k rows of which the first k are used.
static void multiply(int64_t m, int64_t n, int64_t k, const float *a, int64_t rs, int64_t cs, const float *b,
                     int64_t packed_k, float *c, int64_t ld, int add) {
  for (int64_t j = 0; j < n; j += COLS, b += packed_k * COLS)
    for (int64_t i = 0; i < m; i += ROWS)
      any_tile((int)least(ROWS, m - i), a + i * rs, rs, cs, k, b, COLS, c + i * ld + j, ld, least(COLS, n - j), add);
}

// c (m × n) = a (m × k) · b (k × n), all rows one after the other: few read b where it lies, more pack it into `room`.
static void multiply_rows(int64_t m, int64_t n, int64_t k, const float *a, const float *b, float *room, float *c) {
  if (m > FEW || n % COLS) {
    pack(room, b, n, 1, k, n, k);
    multiply(m, n, k, a, k, 1, room, k, c, n, 0);
    return;
  }
  for (int64_t j = 0; j < n; j += COLS)
    for (int64_t i = 0; i < m; i += ROWS)
      any_tile((int)least(ROWS, m - i), a + i * k, k, 1, k, b + j, n, c + i * n + j, n, COLS, 0);
}

// ---- vectors ----

// The first n of LANES numbers, the rest zero.
static inline vf load(const float *from, int64_t n) {
  vf x = {0};
  if (n >= LANES) return *(const vf *)from;
  memcpy(&x, from, (size_t)n * sizeof(float));
  return x;
}

static inline void store(float *to, vf x, int64_t n) {
  if (n >= LANES) *(vf *)to = x;
  else memcpy(to, &x, (size_t)n * sizeof(float));
}

// e^x for x ≤ 0 within 2 units in the last place: 2^n · a polynomial in the rest; 0 below -87.
static inline vf exponential(vf x) {
  vi tiny = x < -87.0f;
  x = (vf)((vi)x & ~tiny);
  vf n = x * 1.442695041f + 12582912.0f;  // 1.5 · 2^23 rounds to the nearest integer
  vi bits = (vi)n << 23;
  n -= 12582912.0f;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (vf)((vi)((vf)((vi)p + bits)) & ~tiny);
}

static inline float total(vf x) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += x[i];
  return sum;
}

static inline vf sigmoid(vf x) {
  vi negative = x < 0.0f;
  vf e = exponential((vf)(((vi)x & negative) | ((vi)-x & ~negative)));
  return (vf)(((vi)e & negative) | ((vi)((vf){0} + 1.0f) & ~negative)) / (1.0f + e);
}

// ---- threads: XLA's own ----

static int failed(XLA_FFI_CallFrame *frame, XLA_FFI_Error *error) {
  if (error == NULL) return 0;
  XLA_FFI_Error_Destroy_Args gone = {sizeof gone, NULL, error};
  frame->api->XLA_FFI_Error_Destroy(&gone);
  return 1;
}

typedef void (*Work)(void *job, int64_t task);
typedef struct {
  Work work;
  void *job;
  int64_t count, next, done, users;
} Queue;

static void leave(Queue *queue) {
  if (!__atomic_sub_fetch(&queue->users, 1, __ATOMIC_ACQ_REL)) free(queue);
}

static void drain(void *given) {
  Queue *queue = given;
  for (int64_t task; (task = __atomic_fetch_add(&queue->next, 1, __ATOMIC_RELAXED)) < queue->count;) {
    queue->work(queue->job, task);
    __atomic_fetch_add(&queue->done, 1, __ATOMIC_RELEASE);
  }
  leave(queue);  // a helper may come when all is done and the caller gone
}

static int64_t threads_of(XLA_FFI_CallFrame *frame) {
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args asked = {sizeof asked, NULL, frame->ctx, &threads};
  return failed(frame, frame->api->XLA_FFI_ThreadPool_NumThreads(&asked)) ? 1 : threads;
}

// Does every task, on as many of XLA's threads as are free; returns when all are done.
static void run(XLA_FFI_CallFrame *frame, Work work, void *job, int64_t count, int64_t products) {
  Queue *queue = malloc(sizeof *queue);
  int64_t helpers = products < 1 << 17 ? 0 : least(threads_of(frame), count) - 1;  // waking one costs some 5 µs
  *queue = (Queue){work, job, count, 0, 0, 2 + (helpers > 0 ? helpers : 0)};
  XLA_FFI_ThreadPool_Schedule_Args helper = {sizeof helper, NULL, frame->ctx, drain, queue};
  for (int64_t i = 0; i < helpers; i++)
    if (failed(frame, frame->api->XLA_FFI_ThreadPool_Schedule(&helper))) leave(queue);
  drain(queue);
  while (__atomic_load_n(&queue->done, __ATOMIC_ACQUIRE) < count) sched_yield();
  leave(queue);
}
