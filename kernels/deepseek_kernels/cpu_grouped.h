// Grouped products: x (T D), w (E D F), y (T F), rows sorted by group.
#pragma once
#include "cpu_product.h"

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
  const float *w = g->w + r.group * g->D * g->F;
  multiply_rows(r.count, g->F, g->D, g->x + r.start * g->D, w, b, g->out + r.start * g->F);
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

// WIDE columns, whole panels, of the gradient xᵀ dy (D × F) of a matrix that `rows` rows went through. More of them would
// read x less often from memory, but be fewer tasks.
enum { WIDE = 64 };
static void outer(int64_t rows, int64_t D, int64_t F, const float *x, const float *dy, int64_t share, float *dw) {
  int64_t at = share * WIDE, width = least(WIDE, F - at);
  float *b = borrow(CHUNK * WIDE);
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
  Rows r = g->tasks[task / pieces(g->F, WIDE)];
  outer(r.count, g->D, g->F, g->x + r.start * g->D, g->dy + r.start * g->F, task % pieces(g->F, WIDE),
        g->out + r.group * g->D * g->F);
}

static void run_grouped(XLA_FFI_CallFrame *frame, Grouped *g, Work work, int64_t chunk) {
  int64_t tasks, used = 0, width = work == grouped_dx ? g->D : g->F;
  g->tasks = cut(g->sizes, g->E, g->T, chunk, work == grouped_dw, &tasks);  // a group without rows has a gradient: zero
  for (int64_t i = 0; i < tasks; i++) used += g->tasks[i].count;
  if (work != grouped_dw) memset(g->out + used * width, 0, (size_t)((g->T - used) * width) * sizeof(float));
  run(frame, work, g, work == grouped_dw ? tasks * pieces(g->F, WIDE) : tasks, g->T * g->D * g->F);
  free(g->tasks);
}
