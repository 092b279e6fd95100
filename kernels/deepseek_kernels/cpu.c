// The CPU's kernels in float32 as XLA calls them: grouped matrix products, routed experts and attention, each forward and
// backward. `cpu.py` compiles this file, and with it the headers, for the processor that it runs on.
#include "cpu_attention.h"
#include "cpu_experts.h"
#include "cpu_grouped.h"

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
