// Calls one of cpu.c's handlers outside XLA: its operands from stdin, its results to stdout. Every number has four bytes;
// a call is the operands and the results, each a count and then rank, dims and, for operands, data. Results start as NaN.
#include <stdio.h>

#include "cpu.c"

static int64_t number(void) {
  int64_t n;
  if (fread(&n, sizeof n, 1, stdin) != 1) exit(2);
  return n;
}

static int64_t buffers(void **to, int given, int64_t *sizes) {
  int64_t count = number();
  for (int64_t i = 0; i < count; i++) {
    XLA_FFI_Buffer *buffer = to[i] = calloc(1, sizeof *buffer);
    buffer->rank = number();
    buffer->dims = malloc((size_t)buffer->rank * sizeof(int64_t));
    sizes[i] = 1;
    for (int64_t d = 0; d < buffer->rank; d++) sizes[i] *= buffer->dims[d] = number();
    buffer->data = malloc((size_t)sizes[i] * 4);
    memset(buffer->data, 0xff, (size_t)sizes[i] * 4);
    if (given && fread(buffer->data, 4, (size_t)sizes[i], stdin) != (size_t)sizes[i]) exit(3);
  }
  return count;
}

// A weight to bfloat16, which it holds already.
static void narrow(XLA_FFI_Buffer *buffer, int64_t size) {
  uint16_t *half = buffer->data;
  for (int64_t i = 0; i < size; i++) half[i] = half[2 * i + 1];
  buffer->dtype = XLA_FFI_DataType_BF16;
}

static XLA_FFI_Error *one_thread(XLA_FFI_ThreadPool_NumThreads_Args *asked) { return *asked->num_threads = 1, NULL; }

#define CALL(name) \
  if (!strcmp(argv[1], #name)) deepseek_##name(&frame);

int main(int argc, char **argv) {
  void *operands[16], *results[16];
  int64_t sizes[16];
  if (argc < 2) return printf("%d %d\n", LANES, ROWS), 0;
  buffers(operands, 1, sizes);
  int64_t count = buffers(results, 0, sizes);
  if (!strncmp(argv[1], "few_", 4)) narrow(operands[1], sizes[1]);
  XLA_FFI_Api api = {.XLA_FFI_ThreadPool_NumThreads = one_thread};
  XLA_FFI_CallFrame frame = {.api = &api, .args = {.args = operands}, .rets = {.rets = results}};
  CALL(grouped_forward) CALL(grouped_dx) CALL(grouped_dw) CALL(experts_forward) CALL(experts_backward)
  CALL(attention_forward) CALL(attention_backward) CALL(few_along) CALL(few_across)
  for (int64_t i = 0; i < count; i++) fwrite(((XLA_FFI_Buffer *)results[i])->data, 4, (size_t)sizes[i], stdout);
  return 0;
}
