// Attention of queries (B S H K) over keys and values of MLA, kv (B T H N+V) with pe (B T R), or grouped ones, k (B T G N)
// and v (B T G V): K = N + R, and the first has G = H, the second R = 0. Results: out (B S H V), log Σ e^score (B S H).
//
// A query sees a key where the key's position is at most its own, their segments are one, and the key is among the row's
// first `lengths`. A strip of QUERIES rows of scores is kept at a time, and the columns outside those that its rows may
// see are skipped, so that causal rows cost little more than half. A query that sees nothing gives zeros.
#pragma once
#include "cpu_product.h"

enum { QUERIES = 32 };

typedef struct {
  const float *q, *k, *v, *pe, *dout;
  const int32_t *q_positions, *k_positions, *q_segments, *k_segments, *lengths;
  float *out, *log_sum, *dq, *dk, *dv, *dpe;
  float scale;
  int64_t B, S, T, H, G, N, R, V;
  int64_t k_step, v_step;  // numbers from one head's key, or value, to the next head's
} Attention;

// ---- who sees whom ----

// A row's keys, whole panels of them: what does not exist stands behind every query.
typedef struct {
  const int32_t *positions, *segments;
} Keys;

static Keys keys_of(const Attention *a, int64_t b, void *room) {
  int64_t wide = whole(a->T), count = least(a->lengths[b] > 0 ? a->lengths[b] : 0, a->T);
  int32_t *positions = room, *segments = positions + wide;
  memcpy(positions, a->k_positions + b * a->T, (size_t)count * sizeof(int32_t));
  memcpy(segments, a->k_segments + b * a->T, (size_t)count * sizeof(int32_t));
  for (int64_t t = count; t < wide; t++) positions[t] = INT32_MAX, segments[t] = 0;
  return (Keys){positions, segments};
}

// A strip: some rows of one head, and the columns [from, to), multiples of COLS, outside which they see nothing.
typedef struct {
  int64_t rows, at, from, to;  // at: of the first row's (b, s, h)
  int32_t positions[QUERIES], segments[QUERIES];
} Strip;

static int any_seen(const Keys *keys, int64_t t, int32_t last, int32_t low, int32_t high) {
  const int32_t *position = keys->positions + t, *segment = keys->segments + t;
  int any = 0;
  for (int j = 0; j < COLS; j++) any |= (position[j] <= last) & (segment[j] >= low) & (segment[j] <= high);
  return any;
}

static Strip strip_of(const Attention *a, const Keys *keys, int64_t b, int64_t s, int64_t h) {
  int64_t row = b * a->S + s;
  Strip strip = {.rows = least(QUERIES, a->S - s), .at = row * a->H + h, .to = whole(a->T)};
  int32_t last = INT32_MIN, low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < strip.rows; i++) {
    int32_t position = (int32_t)least(a->q_positions[row + i], INT32_MAX - 1), segment = a->q_segments[row + i];
    last = position > last ? position : last;
    low = segment < low ? segment : low;
    high = segment > high ? segment : high;
    strip.positions[i] = position;
    strip.segments[i] = segment;
  }
  while (strip.from < strip.to && !any_seen(keys, strip.from, last, low, high)) strip.from += COLS;
  while (strip.from < strip.to && !any_seen(keys, strip.to - COLS, last, low, high)) strip.to -= COLS;
  if (strip.from == strip.to) strip.from = strip.to = 0;
  return strip;
}

static inline vi seen(const Strip *strip, int64_t i, const Keys *keys, int64_t t) {
  return (*(const vi *)(keys->positions + t) <= strip->positions[i]) &
         (*(const vi *)(keys->segments + t) == strip->segments[i]);
}

// ---- softmax ----

// A row's scores, in place: p = e^(s·scale - log_sum), 0 where nothing is seen.
static void softmax_again(const Attention *a, const Strip *strip, int64_t i, const Keys *keys, float *row, float log_sum) {
  for (int64_t t = strip->from; t < strip->to; t += LANES) {
    vi on = seen(strip, i, keys, t);
    vf s = (vf)((vi)(*(vf *)(row + t) * a->scale - log_sum) & on);
    *(vf *)(row + t) = (vf)((vi)exponential(s) & on);
  }
}

// The same where log Σ e^(s·scale) is still to be found: it is returned, -∞ of a row that sees nothing.
static float softmax(const Attention *a, const Strip *strip, int64_t i, const Keys *keys, float *row) {
  vf top = (vf){0} - INFINITY, sum = {0};
  vi some = {0};
  for (int64_t t = strip->from; t < strip->to; t += LANES) {
    vi on = seen(strip, i, keys, t);
    vf s = (vf)(((vi)(*(vf *)(row + t) * a->scale) & on) | ((vi)((vf){0} - INFINITY) & ~on));
    vi more = s > top;
    top = (vf)(((vi)s & more) | ((vi)top & ~more));
    some |= on;
  }
  float shift = -INFINITY;
  int any = 0;
  for (int j = 0; j < LANES; j++) shift = top[j] > shift ? top[j] : shift, any |= some[j];
  if (!any) {
    memset(row + strip->from, 0, (size_t)(strip->to - strip->from) * sizeof(float));
    return -INFINITY;
  }
  for (int64_t t = strip->from; t < strip->to; t += LANES) {
    vi on = seen(strip, i, keys, t);
    vf s = (vf)((vi)(*(vf *)(row + t) * a->scale - shift) & on);
    vf e = (vf)((vi)exponential(s) & on);
    *(vf *)(row + t) = e;
    sum += e;
  }
  float z = total(sum);
  for (int64_t t = strip->from; t < strip->to; t += LANES) *(vf *)(row + t) = *(vf *)(row + t) / z;
  return shift + logf(z);
}

// ---- the two passes ----

// One head's keys and values: its first row's, and the numbers from one row to the next.
typedef struct {
  int64_t k, v, ldk, ldv;
} Head;

static Head head_of(const Attention *a, int64_t b, int64_t g) {
  int64_t first = b * a->T * a->G + g;
  return (Head){first * a->k_step, first * a->v_step, a->G * a->k_step, a->G * a->v_step};
}

// Its keys, [k_nope | pe], as N + R rows of T columns.
static void pack_keys(const Attention *a, float *to, const float *nope, int64_t ldk, const float *pe) {
  pack(to, nope, 1, ldk, a->N, a->T, a->N + a->R);
  pack(to + a->N * COLS, pe, 1, a->R, a->R, a->T, a->N + a->R);
}

static void attention_forward(void *job, int64_t task) {
  const Attention *a = job;
  int64_t b = task / a->H, h = task % a->H, K = a->N + a->R, wide = whole(a->T);
  Head head = head_of(a, b, h * a->G / a->H);
  float *kt = borrow((K + QUERIES + 2) * wide + a->T * whole(a->V)), *vp = kt + K * wide;
  float *p = vp + a->T * whole(a->V);
  Keys keys = keys_of(a, b, p + QUERIES * wide);
  pack_keys(a, kt, a->k + head.k, head.ldk, a->pe + b * a->T * a->R);
  pack(vp, a->v + head.v, head.ldv, 1, a->T, a->V, a->T);
  for (int64_t s = 0; s < a->S; s += QUERIES) {
    Strip strip = strip_of(a, &keys, b, s, h);
    int64_t from = strip.from, count = strip.to - from;
    multiply(strip.rows, count, K, a->q + strip.at * K, a->H * K, 1, kt + from * K, K, p + from, wide, 0);
    for (int64_t i = 0; i < strip.rows; i++)
      a->log_sum[strip.at + i * a->H] = softmax(a, &strip, i, &keys, p + i * wide);
    multiply(strip.rows, a->V, least(count, a->T - from), p + from, wide, 1, vp + from * COLS, a->T,
             a->out + strip.at * a->V, a->H * a->V, 0);
  }
  give_back(kt);
}

// ds = p (dp - Σ dp·p) · scale in place of dp, where Σ dp·p = Σ dout·out.
static void scores_backward(const Attention *a, const Strip *strip, int64_t i, const float *p, float *row) {
  const float *out = a->out + (strip->at + i * a->H) * a->V, *dout = a->dout + (strip->at + i * a->H) * a->V;
  vf products = {0};
  for (int64_t j = 0; j < a->V; j += LANES) products += load(dout + j, a->V - j) * load(out + j, a->V - j);
  float along = total(products);
  for (int64_t t = strip->from; t < strip->to; t += LANES) {
    vf *d = (vf *)(row + t);
    *d = *(const vf *)(p + t) * (*d - along) * a->scale;
  }
}

// One group's task: the gradients of its keys and values are sums over its heads.
static void attention_backward(void *job, int64_t task) {
  const Attention *a = job;
  int64_t b = task / a->G, g = task % a->G, heads = a->H / a->G, wide = whole(a->T), N = a->N, R = a->R, K = N + R;
  int64_t V = a->V, ldq = a->H * K, ldo = a->H * V, ldr = a->G * R;
  Head head = head_of(a, b, g);
  const float *k = a->k + head.k, *v = a->v + head.v, *pe = a->pe + b * a->T * R;
  float *dk = a->dk + head.k, *dv = a->dv + head.v, *dpe = a->dpe + (b * a->T * a->G + g) * R;
  int64_t panels = whole(N) + whole(R);
  float *kt = borrow((K + V + 2 * QUERIES + 2) * wide + (a->T + QUERIES) * panels + QUERIES * whole(V));
  float *vt = kt + K * wide, *kp = vt + V * wide, *rp = kp + a->T * whole(N), *p = rp + a->T * whole(R);
  float *ds = p + QUERIES * wide, *dop = ds + QUERIES * wide, *qn = dop + QUERIES * whole(V);
  float *qr = qn + QUERIES * whole(N);
  Keys keys = keys_of(a, b, qr + QUERIES * whole(R));
  pack_keys(a, kt, k, head.ldk, pe);
  pack(vt, v, 1, head.ldv, V, a->T, V);
  pack(kp, k, head.ldk, 1, a->T, N, a->T);
  pack(rp, pe, R, 1, a->T, R, a->T);
  for (int64_t t = 0; t < a->T; t++) {
    memset(dk + t * head.ldk, 0, (size_t)N * sizeof(float));
    memset(dv + t * head.ldv, 0, (size_t)V * sizeof(float));
    memset(dpe + t * ldr, 0, (size_t)R * sizeof(float));
  }
  for (int64_t h = g * heads; h < (g + 1) * heads; h++)
    for (int64_t s = 0; s < a->S; s += QUERIES) {
      Strip strip = strip_of(a, &keys, b, s, h);
      int64_t rows = strip.rows, from = strip.from, wider = strip.to - from, count = least(wider, a->T - from);
      const float *q = a->q + strip.at * K, *dout = a->dout + strip.at * V;
      float *dq = a->dq + strip.at * K;
      multiply(rows, wider, K, q, ldq, 1, kt + from * K, K, p + from, wide, 0);
      multiply(rows, wider, V, dout, ldo, 1, vt + from * V, V, ds + from, wide, 0);
      for (int64_t i = 0; i < rows; i++) {
        softmax_again(a, &strip, i, &keys, p + i * wide, a->log_sum[strip.at + i * a->H]);
        scores_backward(a, &strip, i, p + i * wide, ds + i * wide);
      }
      pack(qn, q, ldq, 1, rows, N, rows);
      pack(qr, q + N, ldq, 1, rows, R, rows);
      pack(dop, dout, ldo, 1, rows, V, rows);
      multiply(rows, N, count, ds + from, wide, 1, kp + from * COLS, a->T, dq, ldq, 0);
      multiply(rows, R, count, ds + from, wide, 1, rp + from * COLS, a->T, dq + N, ldq, 0);
      multiply(count, N, rows, ds + from, 1, wide, qn, rows, dk + from * head.ldk, head.ldk, 1);
      multiply(count, R, rows, ds + from, 1, wide, qr, rows, dpe + from * ldr, ldr, 1);
      multiply(count, V, rows, p + from, 1, wide, dop, rows, dv + from * head.ldv, head.ldv, 1);
    }
  give_back(kt);
}

static void run_attention(XLA_FFI_CallFrame *frame, Attention *a, Work work) {
  int64_t products = a->B * a->H * a->S * a->T * (a->N + a->R);
  run(frame, work, a, a->B * (work == attention_forward ? a->H : a->G), products);
}
