// The CPU's kernels in float32 as XLA calls them: grouped matrix products, routed experts and attention, each forward and
// backward, what decoding does, and forward alone products with integers. `cpu.py` compiles this file, and with it the
// headers, for the processor that it runs on.
#include "cpu_attention.h"
#include "cpu_experts.h"
#include "cpu_grouped.h"
#include "cpu_integers.h"
#include "cpu_paged.h"
#include "cpu_tiles.h"

static XLA_FFI_Buffer *in(XLA_FFI_CallFrame *frame, int i) { return frame->args.args[i]; }
static float *result(XLA_FFI_CallFrame *frame, int i) { return ((XLA_FFI_Buffer *)frame->rets.rets[i])->data; }

static int64_t bytes_of(XLA_FFI_Buffer *numbers) { return numbers->dtype == XLA_FFI_DataType_BF16 ? 2 : 4; }

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

static int grouped(XLA_FFI_CallFrame *frame) { return in(frame, 2)->rank == 4; }

// q, then kv and pe of MLA or k and v; who sees whom; the scale.
static Attention attention_of(XLA_FFI_CallFrame *frame) {
  int64_t *q = in(frame, 0)->dims, *k = in(frame, 1)->dims, *third = in(frame, 2)->dims;
  Attention a = {.q = in(frame, 0)->data, .k = in(frame, 1)->data, .pe = in(frame, 2)->data,
                 .q_positions = in(frame, 3)->data, .k_positions = in(frame, 4)->data,
                 .q_segments = in(frame, 5)->data, .k_segments = in(frame, 6)->data,
                 .lengths = in(frame, 7)->data, .scale = *(float *)in(frame, 8)->data,
                 .B = q[0], .S = q[1], .H = q[2], .T = k[1], .G = k[2], .N = q[3], .k_step = k[3]};
  if (grouped(frame)) {
    a.v = in(frame, 2)->data, a.V = a.v_step = third[3];
  } else {
    a.R = third[2], a.N -= a.R;
    a.v = a.k + a.N, a.V = k[3] - a.N, a.v_step = k[3];
  }
  return a;
}

static void attention_results(XLA_FFI_CallFrame *frame, Attention *a) {
  a->out = in(frame, 9)->data, a->log_sum = in(frame, 10)->data, a->dout = in(frame, 11)->data;
  a->dq = result(frame, 0), a->dk = result(frame, 1), a->dpe = result(frame, 2);
  a->dv = grouped(frame) ? a->dpe : a->dk + a->N;
}

static Experts experts_of(XLA_FFI_CallFrame *frame) {
  int64_t *choices = in(frame, 2)->dims, *wo = in(frame, 4)->dims;
  return (Experts){.x = in(frame, 0)->data, .weights = in(frame, 1)->data, .experts = in(frame, 2)->data,
                   .wi = in(frame, 3)->data, .wo = in(frame, 4)->data,
                   .T = choices[0], .K = choices[1], .E = wo[0], .F = wo[1], .D = wo[2]};
}

// x, a stack of weights, which of them; the weight is (K N), or (N K) where it lies `across`.
static Few few_of(XLA_FFI_CallFrame *frame, int across) {
  XLA_FFI_Buffer *x = in(frame, 0), *w = in(frame, 1);
  Few f = {.x = x->data, .out = result(frame, 0), .R = x->dims[0], .K = x->dims[1], .N = w->dims[across ? 1 : 2]};
  f.bytes = bytes_of(w);
  f.w = (const char *)w->data + *(int32_t *)in(frame, 2)->data * f.K * f.N * f.bytes;
  return f;
}

// Queries, a stack of pages, which of them, the rows' tables, who sees how many; (G V first); the scale.
static Paged paged_of(XLA_FFI_CallFrame *frame) {
  int64_t *q = in(frame, 0)->dims, *pages = in(frame, 1)->dims;
  int32_t *sizes = in(frame, 5)->data;
  Paged a = {.q = in(frame, 0)->data, .table = in(frame, 3)->data, .limits = in(frame, 4)->data,
             .out = result(frame, 0), .scale = *(float *)in(frame, 6)->data, .B = q[0], .S = q[1], .H = q[2], .K = q[3],
             .P = pages[1], .N = pages[2], .W = pages[3], .J = in(frame, 3)->dims[1],
             .G = sizes[0], .V = sizes[1], .first = sizes[2]};
  a.bytes = bytes_of(in(frame, 1));
  a.pages = (const char *)in(frame, 1)->data + *(int32_t *)in(frame, 2)->data * a.P * a.N * a.W * a.bytes;
  return a;
}

// x, w, scales, sizes, and (terms of a group, the first of w's matrices, bits).
static Integers integers_of(XLA_FFI_CallFrame *frame) {
  int64_t *x = in(frame, 0)->dims, *w = in(frame, 1)->dims, *scales = in(frame, 2)->dims;
  int32_t *numbers = in(frame, 4)->data;
  Grouped rows = {.x = in(frame, 0)->data, .sizes = in(frame, 3)->data, .E = in(frame, 3)->dims[0], .T = x[0],
                  .D = x[1], .F = w[1], .out = result(frame, 0)};
  return (Integers){.rows = rows, .w = in(frame, 1)->data, .scales = in(frame, 2)->data, .K = scales[1],
                    .group = numbers[0], .first = numbers[1], .bits = numbers[2]};
}

static void any_few(XLA_FFI_CallFrame *frame, int across) {
  Few f = few_of(frame, across);
  if (f.bytes == 2 && tiles_allowed()) run_tiles(frame, &f, across);
  else run_few(frame, &f, across);
}

const int deepseek_lanes = LANES;
int deepseek_tiles(void) { return tiles_allowed(); }

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
HANDLER(deepseek_integers_forward, Integers m = integers_of(frame); run_integers(frame, &m))
HANDLER(deepseek_attention_forward, Attention a = attention_of(frame); a.out = result(frame, 0);
        a.log_sum = result(frame, 1); run_attention(frame, &a, attention_forward))
HANDLER(deepseek_attention_backward, Attention a = attention_of(frame); attention_results(frame, &a);
        run_attention(frame, &a, attention_backward))
HANDLER(deepseek_few_along, any_few(frame, 0))
HANDLER(deepseek_few_across, any_few(frame, 1))
HANDLER(deepseek_paged, Paged a = paged_of(frame); run_paged(frame, &a))
