// Grouped products with int8 or int4 matrices: x (T D), w (E F D) with the terms last, scales (E K F) in bfloat16, one for
// each `group` terms of an output; y (T F), rows sorted by group.
//
// Numbers become floats in registers, so that a matrix is read once and as it lies. Two int4 share a byte, the first in
// its low half: x's numbers are woven apart beforehand instead.
#pragma once
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "cpu_grouped.h"

enum { OUTPUTS = 64 };  // of a task
typedef int8_t vb __attribute__((vector_size(LANES), aligned(1)));

// LANES numbers of a byte each; gcc 12 would widen them one by one.
static inline vi whole_numbers(const int8_t *from) {
#if defined __AVX512F__
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined __AVX2__
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
  return __builtin_convertvector(*(const vb *)from, vi);
#endif
}

typedef struct {
  Grouped rows;
  const int8_t *w;
  const uint16_t *scales;
  int64_t K, group, first, bits;
} Integers;

static inline float wide(uint16_t bits) {
  union { uint32_t bits; float number; } it = {(uint32_t)bits << 16};
  return it.number;
}

// Of some outputs and rows: w and the scales of the first output, x and y of the first row.
static inline __attribute__((always_inline)) void dots(const int outs, const int rows, const int bits, const Integers *m,
                                                       const int8_t *w, const uint16_t *scales, const float *x, float *y) {
  int64_t D = m->rows.D, F = m->rows.F, bytes = D * bits / 8;
  vf sum[outs][rows];
  for (int o = 0; o < outs; o++)
    for (int r = 0; r < rows; r++) sum[o][r] = (vf){0};
  for (int64_t k = 0; k < m->K; k++) {
    vf part[outs][rows];
    for (int o = 0; o < outs; o++)
      for (int r = 0; r < rows; r++) part[o][r] = (vf){0};
    for (int64_t d = k * m->group, end = least(d + m->group, D); d < end; d += bits == 8 ? LANES : 2 * LANES)
      for (int o = 0; o < outs; o++) {
        vi q = whole_numbers(w + o * bytes + d * bits / 8);
        vf first = __builtin_convertvector(bits == 8 ? q : q << 28 >> 28, vf), second = __builtin_convertvector(q >> 4, vf);
        for (int r = 0; r < rows; r++) {
          const float *at = x + r * D + d;
          part[o][r] += first * *(const vf *)at;
          if (bits == 4) part[o][r] += second * *(const vf *)(at + LANES);
        }
      }
    for (int o = 0; o < outs; o++)
      for (int r = 0; r < rows; r++) sum[o][r] += wide(scales[k * F + o]) * part[o][r];
  }
  for (int o = 0; o < outs; o++)
    for (int r = 0; r < rows; r++) y[r * F + o] = total(sum[o][r]);
}

#define DOTS(outs, rows, bits) \
  for (; end - f >= outs; f += outs) dots(outs, rows, bits, m, w + f * bytes, scales + f, x + i * D, y + i * F + f);
#define ROWS_OF(rows, outs, bits)                     \
  for (; r.count - i >= rows; i += rows) {            \
    int64_t f = at;                                   \
    DOTS(outs, rows, bits)                            \
    DOTS(1, rows, bits)                               \
  }

static void integers_forward(void *job, int64_t task) {
  Integers *m = job;
  int64_t D = m->rows.D, F = m->rows.F, of_rows = pieces(F, OUTPUTS), bytes = D * m->bits / 8, i = 0;
  int64_t at = task % of_rows * OUTPUTS, end = least(at + OUTPUTS, F);
  Rows r = m->rows.tasks[task / of_rows];
  const int8_t *w = m->w + (m->first + r.group) * F * bytes;
  const uint16_t *scales = m->scales + (m->first + r.group) * m->K * F;
  const float *x = m->rows.x + r.start * D;
  float *y = m->rows.out + r.start * F, *apart = NULL;
  if (m->bits == 4) {
    apart = borrow(r.count * D);
    for (int64_t j = 0; j < r.count * D; j += 2 * LANES)
      for (int l = 0; l < LANES; l++) apart[j + l] = x[j + 2 * l], apart[j + LANES + l] = x[j + 2 * l + 1];
    x = apart;
    ROWS_OF(4, 2, 4) ROWS_OF(2, 2, 4) ROWS_OF(1, 4, 4)
  } else {
    ROWS_OF(4, 2, 8) ROWS_OF(2, 2, 8) ROWS_OF(1, 4, 8)
  }
  if (apart != NULL) give_back(apart);
}

static void run_integers(XLA_FFI_CallFrame *frame, Integers *m) {
  Grouped *g = &m->rows;
  int64_t tasks, used = 0;
  g->tasks = cut(g->sizes, g->E, g->T, CHUNK, 0, &tasks);
  for (int64_t i = 0; i < tasks; i++) used += g->tasks[i].count;
  memset(g->out + used * g->F, 0, (size_t)((g->T - used) * g->F) * sizeof(float));
  run(frame, integers_forward, m, tasks * pieces(g->F, OUTPUTS), g->T * g->D * g->F);
  free(g->tasks);
}
