// Routed experts: x (T D), experts and weights (T K), wi (E D 2F), wo (E F D), y (T D).
//
// y[t] = Σ_k weights[t, k] · (silu(x wi_gate) · x wi_up) wo with the matrices of experts[t, k]. Choices are sorted by
// expert; `gate_up` (T·K, 2F) keeps x wi in that order for the backward pass. A choice of no expert adds nothing. The
// last result of each call is room to work in: XLA has it ready, and malloc would have the pages cleared every time.
#pragma once
#include "cpu_grouped.h"

enum { TOKENS = 48 };

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
  multiply_rows(r.count, 2 * F, D, x, m->wi + r.group * D * 2 * F, b, gate);
  for (int64_t i = 0; i < r.count; i++, gate += 2 * F) {
    float weight = m->weights[m->choice[r.start + i]];
    for (int64_t f = 0; f < F; f += LANES) {
      vf g = load(gate + f, F - f), up = load(gate + F + f, F - f);
      store(h + i * F + f, g * sigmoid(g) * up * weight, F - f);
    }
  }
  multiply_rows(r.count, D, F, h, m->wo + r.group * F * D, b, m->rows + r.start * D);
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

// First the matrices' gradients, some columns at a time, then the tokens'.
static void experts_sums_backward(void *job, int64_t task) {
  Experts *m = job;
  int64_t D = m->D, F = m->F, first = pieces(2 * F, WIDE), each = first + pieces(D, WIDE), share = task % each;
  if (task >= m->count * each) {
    add_rows(m, task - m->count * each, m->dx);
    return;
  }
  Rows r = m->tasks[task / each];
  const float *dgate_up = m->dgate_up + r.start * 2 * F, *dy = m->dys + r.start * D;
  if (share < first) outer(r.count, D, 2 * F, m->xs + r.start * D, dgate_up, share, m->dwi + r.group * D * 2 * F);
  else outer(r.count, F, D, m->hidden + r.start * F, dy, share - first, m->dwo + r.group * F * D);
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
  int64_t matrices = m->count * (pieces(2 * F, WIDE) + pieces(D, WIDE));
  run(frame, experts_sums_backward, m, matrices + pieces(m->T, TOKENS), choices * D * F);
  free(m->tasks), free(m->choice), free(m->sizes);
}
