// Attention of few queries over entries in pages, in float32 or bfloat16, which is widened in registers.
#pragma once
#include "cpu_few.h"

enum { ALONE = 8 };  // fewer rows' groups are tasks of their own

// Queries (B S H K) over P pages of N entries W wide: group g's key begins at g · K, its value at `first` + g · V. Query s
// of row b sees the first limits[b][s] tokens, of which token t is entry t % N of page table[b][t / N].
typedef struct {
  const float *q;
  const char *pages;
  const int32_t *table, *limits;
  float *out, scale;
  int64_t B, S, H, K, P, N, W, J, G, V, first, bytes, together;  // of a number of an entry; groups of a task
} Paged;

// Number `from` of a row's entry t, or of the last of T.
static const char *entry_of(const Paged *a, int64_t b, int64_t t, int64_t T, int64_t from) {
  t = least(t, T - 1);
  int64_t page = a->table[b * a->J + t / a->N];  // where there is none any will do: nobody looks at what comes of it
  return a->pages + (((page < 0 || page >= a->P ? 0 : page) * a->N + t % a->N) * a->W + from) * a->bytes;
}

// Numbers that are soon read from memory.
static inline void ask_for(const char *from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
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

// out (heads V) += weights p, a row `wide` numbers long for each head, of `count` tokens, times values W numbers apart.
static void add_values(const Paged *a, int64_t heads, const float *p, int64_t wide, int64_t count, const char *values,
                       float *out) {
  for (int64_t i = 0; i < heads; i += ROWS, p += ROWS * wide, out += ROWS * a->V) {
    int rows = (int)least(ROWS, heads - i);
    if (a->bytes == 4) {
      for (int64_t j = 0; j < a->V; j += COLS)
        any_tile(rows, p, wide, 1, count, (const float *)values + j, a->W, out + j, a->V, COLS, 1);
      continue;
    }
    for (int64_t t = 0; t < count; t += STRIP) {
      float beside[STRIP * ROWS];
      int64_t some = least(STRIP, count - t);
      for (int64_t l = 0; l < some; l++)
        for (int r = 0; r < rows; r++) beside[l * rows + r] = p[r * wide + t + l];
      for (int64_t j = 0; j < a->V; j += COLS)
        any_few_tile(rows, 1, beside, values + (t * a->W + j) * 2, a->W * 2, some, out + j, a->V, 0, 1);
    }
  }
}

// A task: a row's groups, `together` of them, so that an entry is read in the order in which it lies.
static void paged(void *job, int64_t task) {
  const Paged *a = job;
  int64_t parts = a->G / a->together, row = task / parts, b = row / a->S, g0 = task % parts * a->together;
  int64_t heads = a->H / a->G, all = heads * a->together, at = row * a->H + g0 * heads;
  int64_t T = least(a->limits[row], a->J * a->N), wide = whole(T);
  int64_t from = a->first + g0 * a->V, keys = a->together * a->K * a->bytes, together = a->together * a->V * a->bytes;
  const float *q = a->q + at * a->K;
  float *out = a->out + at * a->V;
  memset(out, 0, (size_t)(all * a->V) * sizeof(float));
  if (T <= 0) return;
  float *p = borrow(all * wide);
  for (int64_t t = 0; t < T; t += RIGHT) {  // what stands behind the last one in its page is not looked at
    for (int64_t i = 2 * RIGHT; i < 3 * RIGHT; i++) ask_for(entry_of(a, b, t + i, T, g0 * a->K), keys);
    const char *entry = entry_of(a, b, t, T, g0 * a->K);
    for (int64_t g = 0; g < all; g += heads, entry += a->K * a->bytes)
      for (int64_t i = g; i < g + heads; i += LEFT)
        any_dots_tile((int)least(LEFT, g + heads - i), a->bytes == 2, q + i * a->K, a->K, entry, a->W * a->bytes, a->K,
                      p + i * wide + t, wide);
  }
  float sums[all];
  for (int64_t i = 0; i < all; i++) sums[i] = weights_of(p + i * wide, T, a->scale);
  for (int64_t t = 0; t < T; t += a->N) {
    const char *values = entry_of(a, b, t, T, from);
    for (int64_t l = a->N; l < least(2 * a->N, T - t); l++) ask_for(entry_of(a, b, t + l, T, from), together);
    for (int64_t g = 0; g < all; g += heads, values += a->V * a->bytes)
      add_values(a, heads, p + g * wide + t, wide, least(a->N, T - t), values, out + g * a->V);
  }
  for (int64_t i = 0; i < all; i++)
    for (int64_t j = 0; j < a->V; j += LANES) *(vf *)(out + i * a->V + j) = *(vf *)(out + i * a->V + j) / sums[i];
  give_back(p);
}

static void run_paged(XLA_FFI_CallFrame *frame, Paged *a) {
  int64_t seen = 0, numbers = a->B * a->S * a->H * a->K;
  float *ordered = a->bytes == 2 ? aligned_alloc(64, (size_t)pieces(numbers, 16) * 64) : NULL;
  if (ordered) order(ordered, a->q, numbers), a->q = ordered;
  for (int64_t i = 0; i < a->B * a->S; i++) seen += least(a->limits[i], a->J * a->N);
  a->together = a->B * a->S < ALONE ? 1 : a->G;
  run(frame, paged, a, a->B * a->S * a->G / a->together, seen * a->H * a->K);
  free(ordered);
}
