// Products of few rows with a weight where it lies, (K N) or (N K), in float32 or bfloat16. Weights are read once, in the
// order in which they lie; what bfloat16 holds is widened in registers, so that it counts as float32 and costs half of
// its bytes.
#pragma once
#include "cpu_product.h"

// Right rows by left rows of a tile of scalar products, whose sums are a vector each.
enum { RIGHT = 4, LEFT = ROWS / 2, STRIP = 64, AHEAD = 24, FAR = 2048, DEEP = 512 };
typedef uint32_t vu __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef float v4 __attribute__((vector_size(16), aligned(4)));

typedef struct {
  const float *x;
  const char *w;
  float *out;
  int64_t R, K, N, bytes;  // of a number of the weight
} Few;

// 2 · LANES numbers of a weight as two vectors: of bfloat16 those in even and in odd places.
static inline __attribute__((always_inline)) void widened(const char *w, const int narrow, vf *b0, vf *b1) {
  if (narrow) {
    vu both = *(const vu *)w;
    *b0 = (vf)(both << 16);
    *b1 = (vf)(both & 0xffff0000u);
  } else {
    *b0 = *(const vf *)w;
    *b1 = *(const vf *)(w + sizeof(vf));
  }
}

// ---- out (R N) = x (R K) · w (K N) ----

// COLS columns, K rows `step` bytes apart, of `rows` rows whose numbers stand side by side, x[l][i]. fetch: from memory.
static inline __attribute__((always_inline)) void few_tile(const int rows, const int narrow, const float *x, const char *w,
                                                           int64_t step, int64_t K, float *out, int64_t ld, int fetch,
                                                           int add) {
  vf sum[ROWS][2];
#pragma GCC unroll 12
  for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = (vf){0};
  for (int64_t l = 0; l < K; l++, w += step, x += rows) {
    vf b0, b1;
    widened(w, narrow, &b0, &b1);
    if (fetch) {
      __builtin_prefetch(w + AHEAD * step);
      if (COLS * (narrow ? 2 : 4) > 64) __builtin_prefetch(w + AHEAD * step + 64);
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
      sum[i][0] += x[i] * b0;
      sum[i][1] += x[i] * b1;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < rows; i++) {
    vf *to = (vf *)(out + i * ld);
    vf first = narrow ? weave(sum[i][0], sum[i][1], 0) : sum[i][0];
    vf second = narrow ? weave(sum[i][0], sum[i][1], 1) : sum[i][1];
    to[0] = add ? to[0] + first : first;
    to[1] = add ? to[1] + second : second;
  }
}

#define FEW_TILE(n) \
  case n: if (narrow) few_tile(n, 1, x, w, step, K, out, ld, fetch, add); \
    else few_tile(n, 0, x, w, step, K, out, ld, fetch, add); \
    break;
static void any_few_tile(int rows, int narrow, const float *x, const char *w, int64_t step, int64_t K, float *out,
                         int64_t ld, int fetch, int add) {
  switch (rows) {
    FEW_TILE(1) FEW_TILE(2) FEW_TILE(3) FEW_TILE(4) FEW_TILE(5) FEW_TILE(6)
#if ROWS == 12
    FEW_TILE(7) FEW_TILE(8) FEW_TILE(9) FEW_TILE(10) FEW_TILE(11) FEW_TILE(12)
#endif
  }
}

// Rows of a wide weight lie pages apart, and in few of the cache's sets: strips of those are copied into panels first.
static int far_apart(const Few *f) { return f->N * f->bytes > FAR; }
static int64_t strip_of_few(const Few *f) { return far_apart(f) ? 4 * STRIP : STRIP; }

static void few_along(void *job, int64_t task) {
  const Few *f = job;
  int64_t groups = pieces(f->R, ROWS), size = strip_of_few(f), first = task * size, last = least(first + size, f->N);
  int64_t step = f->N * f->bytes, wide = COLS * f->bytes;
  char *panels = NULL;
  if (far_apart(f)) {
    panels = (char *)borrow(pieces((last - first) * f->K * f->bytes, 4));
    const char *from = f->w + first * f->bytes;
    for (int64_t l = 0; l < f->K; l++, from += step)
      for (int64_t j = 0; j < (last - first) / COLS; j++) {  // of a size that the compiler knows
        if (f->bytes == 2) memcpy(panels + (j * f->K + l) * wide, from + j * wide, COLS * 2);
        else memcpy(panels + (j * f->K + l) * wide, from + j * wide, COLS * 4);
      }
    step = wide;
  }
  for (int64_t j = first; j < last; j += COLS) {
    const char *w = panels ? panels + (j - first) * f->bytes * f->K : f->w + j * f->bytes;
    for (int64_t k = 0; k < f->K; k += DEEP)  // so much of a panel, and of x, stays in the nearest cache
      for (int64_t g = 0; g < groups; g++) {  // as even as can be
        int64_t from = g * f->R / groups, rows = (g + 1) * f->R / groups - from;
        any_few_tile((int)rows, f->bytes == 2, f->x + from * f->K + k * rows, w + k * step, step, least(DEEP, f->K - k),
                     f->out + from * f->N + j, f->N, !panels && g == 0, k > 0);
      }
  }
  if (panels) give_back((float *)panels);
}

// ---- out[i][j] = x[i] · w[j]: of rows that lie along what is summed ----

// The four vectors' totals.
static inline v4 totals(vf a, vf b, vf c, vf d) {
  vf ac = weave(a, c, 0) + weave(a, c, 1), bd = weave(b, d, 0) + weave(b, d, 1);
  vf all = weave(ac, bd, 0) + weave(ac, bd, 1);  // a b c d a b c d …
  float lanes[LANES];
  *(vf *)lanes = all;
  v4 sum = *(v4 *)lanes;
  for (int i = 4; i < LANES; i += 4) sum += *(v4 *)(lanes + i);
  return sum;
}

// left × 4 of them. x of a bfloat16 weight has each 2 · LANES numbers ordered as `widened` gives them.
static inline __attribute__((always_inline)) void dots_tile(const int left, const int narrow, const float *x, int64_t ldx,
                                                            const char *w, int64_t step, int64_t K, float *out, int64_t ld) {
  vf sum[LEFT][RIGHT];
#pragma GCC unroll 6
  for (int i = 0; i < left; i++)
#pragma GCC unroll 4
    for (int j = 0; j < RIGHT; j++) sum[i][j] = (vf){0};
  for (int64_t l = 0; l < K; l += (narrow ? 2 : 1) * LANES) {
#pragma GCC unroll 4
    for (int j = 0; j < RIGHT; j++) {
      const char *from = w + j * step + l * (narrow ? 2 : 4);
      vf b0, b1;
      if (narrow) widened(from, 1, &b0, &b1);
      else b0 = *(const vf *)from;
#pragma GCC unroll 6
      for (int i = 0; i < left; i++) {
        sum[i][j] += *(const vf *)(x + i * ldx + l) * b0;
        if (narrow) sum[i][j] += *(const vf *)(x + i * ldx + l + LANES) * b1;
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < left; i++) *(v4 *)(out + i * ld) = totals(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
}

#define DOTS_TILE(n) \
  case n: if (narrow) dots_tile(n, 1, x, ldx, w, step, K, out, ld); else dots_tile(n, 0, x, ldx, w, step, K, out, ld); break;
static void any_dots_tile(int left, int narrow, const float *x, int64_t ldx, const char *w, int64_t step, int64_t K,
                          float *out, int64_t ld) {
  switch (left) {
    DOTS_TILE(1) DOTS_TILE(2) DOTS_TILE(3)
#if ROWS == 12
    DOTS_TILE(4) DOTS_TILE(5) DOTS_TILE(6)
#endif
  }
}

static void few_across(void *job, int64_t task) {
  const Few *f = job;
  int64_t groups = pieces(f->R, LEFT), step = f->K * f->bytes, last = least((task + 1) * STRIP, f->N);
  for (int64_t j = task * STRIP; j < last; j += RIGHT)
    for (int64_t g = 0; g < groups; g++) {
      int64_t from = g * f->R / groups, to = (g + 1) * f->R / groups;
      any_dots_tile((int)(to - from), f->bytes == 2, f->x + from * f->K, f->K, f->w + j * step, step, f->K,
                    f->out + from * f->N + j, f->N);
    }
}

// n numbers as `widened` gives those that they are multiplied with.
static void order(float *to, const float *x, int64_t n) {
  for (int64_t l = 0; l < n; l += 2 * LANES)
    for (int i = 0; i < LANES; i++) to[l + i] = x[l + 2 * i], to[l + LANES + i] = x[l + 2 * i + 1];
}

static void run_few(XLA_FFI_CallFrame *frame, Few *f, int across) {
  float *ordered = aligned_alloc(64, (size_t)pieces(f->R * f->K, 16) * 64);
  const float *x = f->x;
  if (!across) {  // by groups of rows
    int64_t groups = pieces(f->R, ROWS);
    for (int64_t g = 0; g < groups; g++) {
      int64_t from = g * f->R / groups, rows = (g + 1) * f->R / groups - from;
      for (int64_t i = 0; i < rows; i++)
        for (int64_t l = 0; l < f->K; l++) ordered[from * f->K + l * rows + i] = x[(from + i) * f->K + l];
    }
  } else if (f->bytes == 2) {
    order(ordered, x, f->R * f->K);
  }
  if (!across || f->bytes == 2) f->x = ordered;
  run(frame, across ? few_across : few_along, f, pieces(f->N, across ? STRIP : strip_of_few(f)), f->R * f->K * f->N);
  free(ordered);
}
