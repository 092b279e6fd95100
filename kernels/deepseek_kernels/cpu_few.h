// What decoding does: products of few rows with a weight where it lies, (K N) or (N K), in float32 or bfloat16, and
// attention of few queries over entries in pages. Weights and entries are read once, in the order in which they lie;
// what bfloat16 holds is widened in registers, so that it counts as float32 and costs half of its bytes.
#pragma once
#include "cpu_product.h"

// Right rows by left rows of a tile of scalar products, whose sums are a vector each.
enum { RIGHT = 4, LEFT = ROWS / 2, STRIP = 64, AHEAD = 24, FAR = 2048, DEEP = 512, ALONE = 8 };
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
    for (int64_t l = 0; l < f->R * f->K; l += 2 * LANES)
      for (int i = 0; i < LANES; i++) ordered[l + i] = x[l + 2 * i], ordered[l + LANES + i] = x[l + 2 * i + 1];
  }
  if (!across || f->bytes == 2) f->x = ordered;
  run(frame, across ? few_across : few_along, f, pieces(f->N, across ? STRIP : strip_of_few(f)), f->R * f->K * f->N);
  free(ordered);
}

// ---- attention over pages ----

// Queries (B S H K) over P pages of N entries W wide: group g's key begins at g · K, its value at `first` + g · V. Query s
// of row b sees the first limits[b][s] tokens, of which token t is entry t % N of page table[b][t / N].
typedef struct {
  const float *q, *pages;
  const int32_t *table, *limits;
  float *out, scale;
  int64_t B, S, H, K, P, N, W, J, G, V, first, together;
} Paged;

static const float *page_of(const Paged *a, int64_t b, int64_t j) {
  int64_t page = a->table[b * a->J + j];  // where there is none any will do: nobody looks at what comes of it
  return a->pages + (page < 0 || page >= a->P ? 0 : page) * a->N * a->W;
}

// Numbers that are soon read from memory.
static inline void ask_for(const float *from, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) __builtin_prefetch(from + i);
}

// A row's scores s, T of them, to e^(s·scale - the largest) in place -> their sum. What fills the row up gets zeros.
static float weights_of(float *p, int64_t T, float scale) {
  vf top = (vf){0} - INFINITY, sum = {0};
  for (int64_t t = T; t < whole(T); t++) p[t] = -INFINITY;
  for (int64_t t = 0; t < T; t += LANES) {
    vf s = *(vf *)(p + t) * scale;
    vi more = s > top;
    top = (vf)(((vi)s & more) | ((vi)top & ~more));
    *(vf *)(p + t) = s;
  }
  float shift = -INFINITY;
  for (int i = 0; i < LANES; i++) shift = top[i] > shift ? top[i] : shift;
  for (int64_t t = 0; t < T; t += LANES) {
    vf e = exponential(*(vf *)(p + t) - shift);
    *(vf *)(p + t) = e;
    sum += e;
  }
  return total(sum);
}

// Entry t of a row, or the last one that it sees.
static const float *entry_of(const Paged *a, int64_t b, int64_t t, int64_t T) {
  t = least(t, T - 1);
  return page_of(a, b, t / a->N) + t % a->N * a->W;
}

// A task: a row's groups, `together` of them, so that an entry is read in the order in which it lies.
static void paged(void *job, int64_t task) {
  const Paged *a = job;
  int64_t parts = a->G / a->together, row = task / parts, b = row / a->S, g0 = task % parts * a->together;
  int64_t heads = a->H / a->G, all = heads * a->together, at = row * a->H + g0 * heads;
  int64_t T = least(a->limits[row], a->J * a->N), wide = whole(T);
  const float *q = a->q + at * a->K;
  float *out = a->out + at * a->V;
  memset(out, 0, (size_t)(all * a->V) * sizeof(float));
  if (T <= 0) return;
  float *p = borrow(all * wide);
  for (int64_t t = 0; t < T; t += RIGHT) {  // what stands behind the last one in its page is not looked at
    for (int64_t i = 0; i < RIGHT; i++) ask_for(entry_of(a, b, t + 2 * RIGHT + i, T) + g0 * a->K, a->together * a->K);
    const char *entry = (const char *)(entry_of(a, b, t, T) + g0 * a->K);
    for (int64_t g = 0; g < all; g += heads, entry += a->K * 4)
      for (int64_t i = g; i < g + heads; i += LEFT)
        any_dots_tile((int)least(LEFT, g + heads - i), 0, q + i * a->K, a->K, entry, a->W * 4, a->K, p + i * wide + t, wide);
  }
  float sums[all];
  for (int64_t i = 0; i < all; i++) sums[i] = weights_of(p + i * wide, T, a->scale);
  for (int64_t t = 0; t < T; t += a->N) {
    const float *values = entry_of(a, b, t, T) + a->first + g0 * a->V;
    const float *next = entry_of(a, b, t + a->N, T) + a->first + g0 * a->V;
    for (int64_t l = 0; l < a->N && t + a->N + l < T; l++) ask_for(next + l * a->W, a->together * a->V);
    for (int64_t g = 0; g < all; g += heads, values += a->V)
      for (int64_t j = 0; j < a->V; j += COLS)
        for (int64_t i = g; i < g + heads; i += ROWS)
          any_tile((int)least(ROWS, g + heads - i), p + i * wide + t, wide, 1, least(a->N, T - t), values + j, a->W,
                   out + i * a->V + j, a->V, COLS, 1);
  }
  for (int64_t i = 0; i < all; i++)
    for (int64_t j = 0; j < a->V; j += LANES) *(vf *)(out + i * a->V + j) = *(vf *)(out + i * a->V + j) / sums[i];
  give_back(p);
}

static void run_paged(XLA_FFI_CallFrame *frame, Paged *a) {
  int64_t seen = 0;
  for (int64_t i = 0; i < a->B * a->S; i++) seen += least(a->limits[i], a->J * a->N);
  a->together = a->B * a->S < ALONE ? 1 : a->G;  // few rows' groups are tasks of their own
  run(frame, paged, a, a->B * a->S * a->G / a->together, seen * a->H * a->K);
}
