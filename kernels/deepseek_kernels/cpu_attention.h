// Attention: q (B S H N+R), kv (B T H N+V), pe (B T R), mask (B S T), out (B S H V), log of the sum (B S H).
//
// A strip of QUERIES rows of scores is kept at a time, and the columns that its mask leaves out are skipped, so that
// causal rows cost little more than half.
#pragma once
#include "cpu_product.h"

enum { QUERIES = 32 };

typedef struct {
  const float *q, *kv, *pe, *dout;
  const int8_t *mask;
  float *out, *log_sum, *dq, *dkv, *dpe;
  float scale;
  int64_t B, S, T, H, N, R, V;
} Attention;

// The columns [*from, *to) that a strip's rows may attend to: multiples of COLS; all of them where a row has none.
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
