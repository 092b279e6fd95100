// The CPU's kernels in float32: grouped matrix products, routed experts and attention, each forward and backward.
//
// Everything is one matrix product over strided operands, `multiply`: it computes 12 × 32 tiles in registers from a
// right operand that `pack` has laid out in panels of 32 columns. Attention keeps a strip of QUERIES rows of scores
// and skips the columns that a strip's mask leaves out, so that causal rows cost little more than half. Work is cut
// into tasks for XLA's threads; every number is summed by one of them in one order, so results do not depend on how
// many there are.
//
// Vectors are the compiler's (16 floats), so it builds for any processor; `cpu.py` compiles it for the one it runs on.
#define _GNU_SOURCE
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

enum { ROWS = 12, COLS = 32, LANES = 16, QUERIES = 32, CHUNK = 192, TOKENS = 48, KEPT = 1 << 20 };
typedef float vf __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int8_t vb __attribute__((vector_size(LANES), aligned(1)));

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }
static inline int64_t whole(int64_t n) { return pieces(n, COLS) * COLS; }

// n numbers for a task, whose thread keeps them for its next one unless they are many.
static __thread float *kept_numbers;
static float *borrow(int64_t n) {
  if (n > KEPT) return aligned_alloc(64, (size_t)whole(n) * sizeof(float));
  if (kept_numbers == NULL) kept_numbers = aligned_alloc(64, KEPT * sizeof(float));
  return kept_numbers;
}
static void give_back(float *numbers) {
  if (numbers != kept_numbers) free(numbers);
}

// ---- the product ----

// Two vectors woven into each other, a0 b0 a1 b1 …: its first half and its second.
static inline vf weave(vf a, vf b, int second) {
#define PAIRS(i) i, i + 16, i + 1, i + 17, i + 2, i + 18, i + 3, i + 19, i + 4, i + 20, i + 5, i + 21, i + 6, i + 22, i + 7, i + 23
#ifdef __clang__
  return second ? __builtin_shufflevector(a, b, PAIRS(8)) : __builtin_shufflevector(a, b, PAIRS(0));
#else
  return second ? __builtin_shuffle(a, b, (vi){PAIRS(8)}) : __builtin_shuffle(a, b, (vi){PAIRS(0)});
#endif
}

// to[i][j] = b[j][i] for 16 × 16 numbers.
static void turn(float *to, int64_t ldto, const float *b, int64_t ldb) {
  vf x[LANES], y[LANES];
  for (int i = 0; i < LANES; i++) x[i] = *(const vf *)(b + i * ldb);
  for (int round = 0; round < 2; round++) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) y[2 * i] = weave(x[i], x[i + 8], 0), y[2 * i + 1] = weave(x[i], x[i + 8], 1);
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; i++) x[2 * i] = weave(y[i], y[i + 8], 0), x[2 * i + 1] = weave(y[i], y[i + 8], 1);
  }
  for (int i = 0; i < LANES; i++) *(vf *)(to + i * ldto) = x[i];
}

// Panels of b (k × n, element (i, j) at b[i·rs + j·cs], one of the strides 1): panel p holds columns 32p…32p+31 as
// [k][32], zero-padded; the next one begins `tall` ≥ k rows further on.
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

// c (rows × width) = or += a (rows × k) · one panel; element (i, l) of a at a[i·rs + l·cs].
static inline __attribute__((always_inline)) void tile(const int rows, const float *a, int64_t rs, int64_t cs, int64_t k,
                                                       const float *panel, float *c, int64_t ld, int64_t width, int add) {
  vf sum[ROWS][2];
#pragma GCC unroll 12
  for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (vf){0};
  for (int64_t l = 0; l < k; l++, panel += COLS) {
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
  case n: tile(n, a, rs, cs, k, panel, c, ld, width, add); break;
static void any_tile(int rows, const float *a, int64_t rs, int64_t cs, int64_t k, const float *panel, float *c,
                     int64_t ld, int64_t width, int add) {
  switch (rows) {
    TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
  }
}

// c (m × n) = or += a (m × k) · b (k × n), b packed for `packed_k` ≥ k rows of which the first k are used.
static void multiply(int64_t m, int64_t n, int64_t k, const float *a, int64_t rs, int64_t cs, const float *b,
                     int64_t packed_k, float *c, int64_t ld, int add) {
  for (int64_t j = 0; j < n; j += COLS, b += packed_k * COLS)
    for (int64_t i = 0; i < m; i += ROWS)
      any_tile((int)least(ROWS, m - i), a + i * rs, rs, cs, k, b, c + i * ld + j, ld, least(COLS, n - j), add);
}

// ---- vectors ----

// The first n of 16 numbers, the rest zero.
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

// ---- grouped products: x (T D), w (E D F), y (T F), rows sorted by group ----

// Rows of one group: a task.
typedef struct {
  int64_t group, start, count;
} Rows;

// Cuts each group's rows into tasks of at most `chunk`; a group without rows gives a task where `empty` says so.
static Rows *cut(const int32_t *sizes, int64_t E, int64_t T, int64_t chunk, int empty, int64_t *tasks) {
  Rows *to = malloc((size_t)(E + T / chunk + 1) * sizeof(Rows));
  int64_t start = 0;
  *tasks = 0;
  for (int64_t e = 0; e < E; e++) {
    int64_t end = least(start + sizes[e], T);
    do {
      int64_t count = least(chunk, end - start);
      if (count > 0 || empty) to[(*tasks)++] = (Rows){e, start, count};
      start += count;
    } while (start < end);
  }
  return to;
}

typedef struct {
  const float *x, *w, *dy;
  float *out;
  const int32_t *sizes;
  int64_t T, E, D, F;
  Rows *tasks;
} Grouped;

static void grouped_forward(void *job, int64_t task) {
  Grouped *g = job;
  Rows r = g->tasks[task];
  float *b = borrow(g->D * whole(g->F));
  pack(b, g->w + r.group * g->D * g->F, g->F, 1, g->D, g->F, g->D);
  multiply(r.count, g->F, g->D, g->x + r.start * g->D, g->D, 1, b, g->D, g->out + r.start * g->F, g->F, 0);
  give_back(b);
}

static void grouped_dx(void *job, int64_t task) {
  Grouped *g = job;
  Rows r = g->tasks[task];
  float *b = borrow(g->F * whole(g->D));
  pack(b, g->w + r.group * g->D * g->F, 1, g->F, g->F, g->D, g->F);
  multiply(r.count, g->D, g->F, g->dy + r.start * g->F, g->F, 1, b, g->F, g->out + r.start * g->D, g->D, 0);
  give_back(b);
}

// One panel of columns of the gradient xᵀ dy (D × F) of a matrix that `rows` rows went through.
static void outer(int64_t rows, int64_t D, int64_t F, const float *x, const float *dy, int64_t panel, float *dw) {
  int64_t at = panel * COLS, width = least(COLS, F - at);
  float *b = borrow(CHUNK * COLS);
  for (int64_t d = 0; d < D && !rows; d++) memset(dw + d * F + at, 0, (size_t)width * sizeof(float));
  for (int64_t i = 0; i < rows; i += CHUNK) {
    int64_t count = least(CHUNK, rows - i);
    pack(b, dy + i * F + at, F, 1, count, width, count);
    multiply(D, width, count, x + i * D, 1, D, b, count, dw + at, F, i > 0);
  }
  give_back(b);
}

static void grouped_dw(void *job, int64_t task) {
  Grouped *g = job;
  Rows r = g->tasks[task / pieces(g->F, COLS)];
  outer(r.count, g->D, g->F, g->x + r.start * g->D, g->dy + r.start * g->F, task % pieces(g->F, COLS),
        g->out + r.group * g->D * g->F);
}

static void run_grouped(XLA_FFI_CallFrame *frame, Grouped *g, Work work, int64_t chunk) {
  int64_t tasks, used = 0, width = work == grouped_dx ? g->D : g->F;
  g->tasks = cut(g->sizes, g->E, g->T, chunk, work == grouped_dw, &tasks);  // a group without rows has a gradient: zero
  for (int64_t i = 0; i < tasks; i++) used += g->tasks[i].count;
  if (work != grouped_dw) memset(g->out + used * width, 0, (size_t)((g->T - used) * width) * sizeof(float));
  run(frame, work, g, work == grouped_dw ? tasks * pieces(g->F, COLS) : tasks, g->T * g->D * g->F);
  free(g->tasks);
}

// ---- routed experts: x (T D), experts and weights (T K), wi (E D 2F), wo (E F D), y (T D) ----
//
// y[t] = Σ_k weights[t, k] · (silu(x wi_gate) · x wi_up) wo with the matrices of experts[t, k]. Choices are sorted by
// expert; `gate_up` (T·K, 2F) keeps x wi in that order for the backward pass. A choice of no expert adds nothing. The
// last result of each call is room to work in: XLA has it ready, and malloc would have the pages cleared every time.

typedef struct {
  const float *x, *weights, *wi, *wo, *dy;
  const int32_t *experts;
  float *gate_up, *y, *dx, *dweights, *dwi, *dwo;
  int64_t T, K, E, D, F;
  int32_t *sizes;                              // rows of each expert
  int64_t *choice, *place;                     // of each sorted row, its choice; of each choice, its row, or -1
  float *rows, *xs, *dys, *hidden, *dgate_up;  // by sorted row: what it adds to y or dx; x, dy, weighted hidden
  Rows *tasks;
  int64_t count;
} Experts;

static void sort_choices(Experts *m) {
  int64_t choices = m->T * m->K, start = 0;
  int64_t *next = malloc((size_t)m->E * sizeof(int64_t));
  m->sizes = calloc((size_t)m->E, sizeof(int32_t));
  m->choice = malloc(2 * (size_t)choices * sizeof(int64_t));
  m->place = m->choice + choices;
  for (int64_t c = 0; c < choices; c++)
    if ((uint32_t)m->experts[c] < m->E) m->sizes[m->experts[c]]++;
  for (int64_t e = 0; e < m->E; start += m->sizes[e++]) next[e] = start;
  for (int64_t c = 0; c < choices; c++) {
    m->place[c] = (uint32_t)m->experts[c] < m->E ? next[m->experts[c]]++ : -1;
    if (m->place[c] >= 0) m->choice[m->place[c]] = c;
  }
  free(next);
}

static void gather(const Experts *m, Rows r, const float *from, float *to) {
  for (int64_t i = 0; i < r.count; i++)
    memcpy(to + i * m->D, from + m->choice[r.start + i] / m->K * m->D, (size_t)m->D * sizeof(float));
}

static void experts_forward(void *job, int64_t task) {
  Experts *m = job;
  Rows r = m->tasks[task];
  int64_t D = m->D, F = m->F;
  float *b = borrow(D * whole(2 * F) + F * whole(D) + r.count * (D + F)), *x = b + D * whole(2 * F) + F * whole(D);
  float *gate = m->gate_up + r.start * 2 * F, *h = x + r.count * D;
  gather(m, r, m->x, x);
  pack(b, m->wi + r.group * D * 2 * F, 2 * F, 1, D, 2 * F, D);
  multiply(r.count, 2 * F, D, x, D, 1, b, D, gate, 2 * F, 0);
  for (int64_t i = 0; i < r.count; i++, gate += 2 * F) {
    float weight = m->weights[m->choice[r.start + i]];
    for (int64_t f = 0; f < F; f += LANES) {
      vf g = load(gate + f, F - f), up = load(gate + F + f, F - f);
      store(h + i * F + f, g * sigmoid(g) * up * weight, F - f);
    }
  }
  pack(b, m->wo + r.group * F * D, D, 1, F, D, F);
  multiply(r.count, D, F, h, F, 1, b, F, m->rows + r.start * D, D, 0);
  give_back(b);
}

// to[t] = Σ_k rows of t's choices, for TOKENS tokens.
static void add_rows(const Experts *m, int64_t piece, float *to) {
  int64_t end = least((piece + 1) * TOKENS, m->T);
  for (int64_t t = piece * TOKENS; t < end; t++) {
    memset(to + t * m->D, 0, (size_t)m->D * sizeof(float));
    for (int64_t k = 0; k < m->K; k++) {
      const float *row = m->rows + m->place[t * m->K + k] * m->D;
      if (m->place[t * m->K + k] >= 0)
        for (int64_t d = 0; d < m->D; d++) to[t * m->D + d] += row[d];
    }
  }
}

static void experts_sum(void *job, int64_t task) { add_rows(job, task, ((Experts *)job)->y); }

static void experts_rows_backward(void *job, int64_t task) {
  Experts *m = job;
  Rows r = m->tasks[task];
  int64_t D = m->D, F = m->F;
  float *b = borrow(D * whole(F) + 2 * F * whole(D) + r.count * F), *dh = b + D * whole(F) + 2 * F * whole(D);
  float *dgate_up = m->dgate_up + r.start * 2 * F, *dy = m->dys + r.start * D;
  gather(m, r, m->x, m->xs + r.start * D);
  gather(m, r, m->dy, dy);
  pack(b, m->wo + r.group * F * D, 1, D, D, F, D);
  multiply(r.count, F, D, dy, D, 1, b, D, dh, F, 0);
  for (int64_t i = 0; i < r.count; i++) {
    int64_t row = r.start + i;
    const float *gate = m->gate_up + row * 2 * F;
    float weight = m->weights[m->choice[row]];
    vf along = {0};
    for (int64_t f = 0; f < F; f += LANES) {
      int64_t n = F - f;
      vf g = load(gate + f, n), up = load(gate + F + f, n), d = load(dh + i * F + f, n);
      vf s = sigmoid(g), silu = g * s;
      along += d * silu * up;
      d *= weight;
      store(m->hidden + row * F + f, silu * up * weight, n);
      store(dgate_up + i * 2 * F + f, d * up * (s + silu * (1.0f - s)), n);
      store(dgate_up + i * 2 * F + F + f, d * silu, n);
    }
    m->dweights[m->choice[row]] = total(along);
  }
  pack(b, m->wi + r.group * D * 2 * F, 1, 2 * F, 2 * F, D, 2 * F);
  multiply(r.count, D, 2 * F, dgate_up, 2 * F, 1, b, 2 * F, m->rows + r.start * D, D, 0);
  give_back(b);
}

// First the matrices' gradients, a panel at a time, then the tokens'.
static void experts_sums_backward(void *job, int64_t task) {
  Experts *m = job;
  int64_t D = m->D, F = m->F, wide = pieces(2 * F, COLS), each = wide + pieces(D, COLS), panel = task % each;
  if (task >= m->count * each) {
    add_rows(m, task - m->count * each, m->dx);
    return;
  }
  Rows r = m->tasks[task / each];
  const float *dgate_up = m->dgate_up + r.start * 2 * F, *dy = m->dys + r.start * D;
  if (panel < wide) outer(r.count, D, 2 * F, m->xs + r.start * D, dgate_up, panel, m->dwi + r.group * D * 2 * F);
  else outer(r.count, F, D, m->hidden + r.start * F, dy, panel - wide, m->dwo + r.group * F * D);
}

static void run_experts_forward(XLA_FFI_CallFrame *frame, Experts *m) {
  int64_t choices = m->T * m->K;
  sort_choices(m);
  m->tasks = cut(m->sizes, m->E, choices, CHUNK, 0, &m->count);
  run(frame, experts_forward, m, m->count, choices * m->D * m->F);
  run(frame, experts_sum, m, pieces(m->T, TOKENS), choices * m->D);
  free(m->tasks), free(m->choice), free(m->sizes);
}

static void run_experts_backward(XLA_FFI_CallFrame *frame, Experts *m) {
  int64_t choices = m->T * m->K, D = m->D, F = m->F;
  sort_choices(m);
  m->xs = m->rows + choices * D;
  m->dys = m->xs + choices * D;
  m->hidden = m->dys + choices * D;
  m->dgate_up = m->hidden + choices * F;
  memset(m->dweights, 0, (size_t)choices * sizeof(float));
  m->tasks = cut(m->sizes, m->E, choices, CHUNK, 0, &m->count);
  run(frame, experts_rows_backward, m, m->count, choices * D * F);
  free(m->tasks);
  m->tasks = cut(m->sizes, m->E, choices, INT64_MAX / 2, 1, &m->count);
  int64_t matrices = m->count * (pieces(2 * F, COLS) + pieces(D, COLS));
  run(frame, experts_sums_backward, m, matrices + pieces(m->T, TOKENS), choices * D * F);
  free(m->tasks), free(m->choice), free(m->sizes);
}

// ---- attention: q (B S H N+R), kv (B T H N+V), pe (B T R), mask (B S T), out (B S H V), log of the sum (B S H) ----

typedef struct {
  const float *q, *kv, *pe, *dout;
  const int8_t *mask;
  float *out, *log_sum, *dq, *dkv, *dpe;
  float scale;
  int64_t B, S, T, H, N, R, V;
} Attention;

// The columns [*from, *to) that a strip's rows may attend to: multiples of 32; all of them where a row has none.
static void strip_range(const Attention *a, const int8_t *mask, int64_t rows, int8_t *kept, int64_t *from, int64_t *to) {
  int64_t low = a->T, high = 0, wide = whole(a->T);
  memset(kept, 0, (size_t)(rows * wide));
  for (int64_t i = 0; i < rows; i++) {
    memcpy(kept + i * wide, mask + i * a->T, (size_t)a->T);
    const int8_t *row = mask + i * a->T, *one = memchr(row, 1, (size_t)a->T), *end = memrchr(row, 1, (size_t)a->T);
    int64_t first = one ? one - row : 0, last = one ? end - row + 1 : a->T;
    low = least(low, first);
    high = high > last ? high : last;
  }
  *from = low / COLS * COLS;
  *to = whole(high);
}

// Scores of a strip, in place: p = e^(s·scale - shift), 0 where masked. Without shifts given, finds the row's own
// maximum and returns log Σ e^(s·scale) in log_sum; ∞ there marks a row that may attend to nothing: p = 1/T.
static void softmax_strip(const Attention *a, float *p, const int8_t *kept, int64_t rows, int64_t from, int64_t to,
                          float *log_sum, int64_t stride, int given) {
  int64_t wide = whole(a->T);
  for (int64_t i = 0; i < rows; i++) {
    float *row = p + i * wide, shift = log_sum[i * stride];
    const int8_t *may = kept + i * wide;
    if (!given) {
      vf top = (vf){0} - INFINITY;
      for (int64_t t = from; t < to; t += LANES) {
        vi on = __builtin_convertvector(*(const vb *)(may + t) != 0, vi);
        vf s = (vf)(((vi)(*(vf *)(row + t) * a->scale) & on) | ((vi)((vf){0} - INFINITY) & ~on));
        vi more = s > top;
        top = (vf)(((vi)s & more) | ((vi)top & ~more));
      }
      shift = -INFINITY;
      for (int j = 0; j < LANES; j++) shift = top[j] > shift ? top[j] : shift;
      if (shift == -INFINITY) shift = INFINITY;
    }
    if (shift == INFINITY) {
      for (int64_t t = from; t < to; t++) row[t] = t < a->T ? 1.0f / (float)a->T : 0.0f;
      log_sum[i * stride] = INFINITY;
      continue;
    }
    vf sum = {0};
    for (int64_t t = from; t < to; t += LANES) {
      vi on = __builtin_convertvector(*(const vb *)(may + t) != 0, vi);
      vf s = (vf)((vi)(*(vf *)(row + t) * a->scale - shift) & on);
      vf e = (vf)((vi)exponential(s) & on);
      *(vf *)(row + t) = e;
      sum += e;
    }
    if (!given) {
      float z = total(sum);
      for (int64_t t = from; t < to; t += LANES) *(vf *)(row + t) = *(vf *)(row + t) / z;
      log_sum[i * stride] = shift + logf(z);
    }
  }
}

// The keys of one head, [k_nope | pe], as N + R rows of T columns.
static void pack_keys(const Attention *a, float *to, const float *nope, const float *pe) {
  pack(to, nope, 1, a->H * (a->N + a->V), a->N, a->T, a->N + a->R);
  pack(to + a->N * COLS, pe, 1, a->R, a->R, a->T, a->N + a->R);
}

static void attention_forward(void *job, int64_t task) {
  const Attention *a = job;
  int64_t b = task / a->H, h = task % a->H, wide = whole(a->T), from, to, K = a->N + a->R, W = a->N + a->V;
  const float *kv = a->kv + (b * a->T * a->H + h) * W;
  float *kt = borrow(K * wide + a->T * whole(a->V) + 2 * QUERIES * wide), *vp = kt + K * wide;
  float *p = vp + a->T * whole(a->V);
  int8_t *kept = (void *)(p + QUERIES * wide);
  pack_keys(a, kt, kv, a->pe + b * a->T * a->R);
  pack(vp, kv + a->N, a->H * W, 1, a->T, a->V, a->T);
  for (int64_t s = 0; s < a->S; s += QUERIES) {
    int64_t rows = least(QUERIES, a->S - s), at = (b * a->S + s) * a->H + h;
    strip_range(a, a->mask + (b * a->S + s) * a->T, rows, kept, &from, &to);
    multiply(rows, to - from, K, a->q + at * K, a->H * K, 1, kt + from * K, K, p + from, wide, 0);
    softmax_strip(a, p, kept, rows, from, to, a->log_sum + at, a->H, 0);
    multiply(rows, a->V, least(to, a->T) - from, p + from, wide, 1, vp + from * COLS, a->T, a->out + at * a->V,
             a->H * a->V, 0);
  }
  give_back(kt);
}

static void attention_backward(void *job, int64_t task) {
  const Attention *a = job;
  int64_t b = task / a->H, h = task % a->H, wide = whole(a->T), from, to, N = a->N, R = a->R, K = N + R;
  int64_t ldk = a->H * K, ldv = a->H * a->V, ldw = a->H * (N + a->V), ldr = a->H * R;
  const float *kv = a->kv + (b * a->T * a->H + h) * (N + a->V), *pe = a->pe + b * a->T * R;
  float *dkv = a->dkv + (b * a->T * a->H + h) * (N + a->V), *dpe = a->dpe + (b * a->T * a->H + h) * R;
  int64_t panels = whole(N) + whole(R);
  float *kt = borrow((K + a->V + 3 * QUERIES) * wide + (a->T + QUERIES) * panels + QUERIES * whole(a->V));
  float *vt = kt + K * wide, *kp = vt + a->V * wide, *rp = kp + a->T * whole(N), *p = rp + a->T * whole(R);
  float *ds = p + QUERIES * wide, *dop = ds + QUERIES * wide, *qn = dop + QUERIES * whole(a->V);
  float *qr = qn + QUERIES * whole(N);
  int8_t *kept = (void *)(qr + QUERIES * whole(R));
  pack_keys(a, kt, kv, pe);
  pack(vt, kv + N, 1, ldw, a->V, a->T, a->V);
  pack(kp, kv, ldw, 1, a->T, N, a->T);
  pack(rp, pe, R, 1, a->T, R, a->T);
  for (int64_t t = 0; t < a->T; t++) {
    memset(dkv + t * ldw, 0, (size_t)(N + a->V) * sizeof(float));
    memset(dpe + t * ldr, 0, (size_t)R * sizeof(float));
  }
  for (int64_t s = 0; s < a->S; s += QUERIES) {
    int64_t rows = least(QUERIES, a->S - s), at = (b * a->S + s) * a->H + h;
    const float *q = a->q + at * K, *dout = a->dout + at * a->V, *out = a->out + at * a->V;
    float *dq = a->dq + at * K;
    strip_range(a, a->mask + (b * a->S + s) * a->T, rows, kept, &from, &to);
    int64_t count = least(to, a->T) - from;
    multiply(rows, to - from, K, q, ldk, 1, kt + from * K, K, p + from, wide, 0);
    softmax_strip(a, p, kept, rows, from, to, a->log_sum + at, a->H, 1);
    multiply(rows, to - from, a->V, dout, ldv, 1, vt + from * a->V, a->V, ds + from, wide, 0);
    for (int64_t i = 0; i < rows; i++) {
      vf products = {0};
      for (int64_t j = i * ldv, n = a->V; n > 0; j += LANES, n -= LANES) products += load(dout + j, n) * load(out + j, n);
      float along = total(products);  // Σ dp·p = Σ dout·out
      for (int64_t t = from; t < to; t += LANES) {
        vf *d = (vf *)(ds + i * wide + t);
        vi on = __builtin_convertvector(*(const vb *)(kept + i * wide + t) != 0, vi);
        *d = (vf)((vi)(*(vf *)(p + i * wide + t) * (*d - along) * a->scale) & on);
      }
    }
    pack(qn, q, ldk, 1, rows, N, rows);
    pack(qr, q + N, ldk, 1, rows, R, rows);
    pack(dop, dout, ldv, 1, rows, a->V, rows);
    multiply(rows, N, count, ds + from, wide, 1, kp + from * COLS, a->T, dq, ldk, 0);
    multiply(rows, R, count, ds + from, wide, 1, rp + from * COLS, a->T, dq + N, ldk, 0);
    multiply(count, N, rows, ds + from, 1, wide, qn, rows, dkv + from * ldw, ldw, 1);
    multiply(count, R, rows, ds + from, 1, wide, qr, rows, dpe + from * ldr, ldr, 1);
    multiply(count, a->V, rows, p + from, 1, wide, dop, rows, dkv + N + from * ldw, ldw, 1);
  }
  give_back(kt);
}

// ---- what XLA calls ----

static XLA_FFI_Buffer *in(XLA_FFI_CallFrame *frame, int i) { return frame->args.args[i]; }
static float *result(XLA_FFI_CallFrame *frame, int i) { return ((XLA_FFI_Buffer *)frame->rets.rets[i])->data; }

// XLA first asks which version of its interface a handler was built for.
static int only_asked(XLA_FFI_CallFrame *frame) {
  XLA_FFI_Metadata_Extension *question = (void *)frame->extension_start;
  if (question == NULL || question->extension_base.type != XLA_FFI_Extension_Metadata) return 0;
  question->metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  question->metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  return 1;
}

// Each takes two operands and the sizes: (x, w), (dy, w), (x, dy).
static Grouped grouped_of(XLA_FFI_CallFrame *frame) {
  int64_t *a = in(frame, 0)->dims, *b = in(frame, 1)->dims;
  Grouped g = {.sizes = in(frame, 2)->data, .E = in(frame, 2)->dims[0], .T = a[0], .out = result(frame, 0)};
  g.x = in(frame, 0)->data, g.dy = in(frame, 0)->data, g.w = in(frame, 1)->data;
  if (in(frame, 1)->rank == 3) g.D = b[1], g.F = b[2];
  else g.D = a[1], g.F = b[1], g.dy = in(frame, 1)->data;
  return g;
}

static Attention attention_of(XLA_FFI_CallFrame *frame) {
  int64_t *q = in(frame, 0)->dims, *kv = in(frame, 1)->dims, R = in(frame, 2)->dims[2], N = q[3] - R;
  return (Attention){.q = in(frame, 0)->data, .kv = in(frame, 1)->data, .pe = in(frame, 2)->data,
                     .mask = in(frame, 3)->data, .scale = *(float *)in(frame, 4)->data,
                     .B = q[0], .S = q[1], .H = q[2], .T = kv[1], .N = N, .R = R, .V = kv[3] - N};
}

static Experts experts_of(XLA_FFI_CallFrame *frame) {
  int64_t *choices = in(frame, 2)->dims, *wo = in(frame, 4)->dims;
  return (Experts){.x = in(frame, 0)->data, .weights = in(frame, 1)->data, .experts = in(frame, 2)->data,
                   .wi = in(frame, 3)->data, .wo = in(frame, 4)->data,
                   .T = choices[0], .K = choices[1], .E = wo[0], .F = wo[1], .D = wo[2]};
}

#define HANDLER(name, body)                           \
  XLA_FFI_Error *name(XLA_FFI_CallFrame *frame) {     \
    if (only_asked(frame)) return NULL;               \
    body;                                             \
    return NULL;                                      \
  }

HANDLER(deepseek_grouped_forward, Grouped g = grouped_of(frame); run_grouped(frame, &g, grouped_forward, CHUNK))
HANDLER(deepseek_grouped_dx, Grouped g = grouped_of(frame); run_grouped(frame, &g, grouped_dx, CHUNK))
HANDLER(deepseek_grouped_dw, Grouped g = grouped_of(frame); run_grouped(frame, &g, grouped_dw, INT64_MAX / 2))
HANDLER(deepseek_experts_forward, Experts m = experts_of(frame); m.y = result(frame, 0); m.gate_up = result(frame, 1);
        m.rows = result(frame, 2); run_experts_forward(frame, &m))
HANDLER(deepseek_experts_backward, Experts m = experts_of(frame); m.gate_up = in(frame, 5)->data;
        m.dy = in(frame, 6)->data; m.dx = result(frame, 0); m.dweights = result(frame, 1); m.dwi = result(frame, 2);
        m.dwo = result(frame, 3); m.rows = result(frame, 4); run_experts_backward(frame, &m))
HANDLER(deepseek_attention_forward, Attention a = attention_of(frame); a.out = result(frame, 0);
        a.log_sum = result(frame, 1); run(frame, attention_forward, &a, a.B * a.H, a.B * a.H * a.S * a.T * (a.N + a.R)))
HANDLER(deepseek_attention_backward, Attention a = attention_of(frame); a.out = in(frame, 5)->data;
        a.log_sum = in(frame, 6)->data; a.dout = in(frame, 7)->data; a.dq = result(frame, 0);
        a.dkv = result(frame, 1); a.dpe = result(frame, 2);
        run(frame, attention_backward, &a, a.B * a.H, a.B * a.H * a.S * a.T * (a.N + a.R)))
