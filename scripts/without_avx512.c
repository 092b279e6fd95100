// Hides AVX-512 and AMX from a program on an x86 Linux host that has them, so that libraries which ask the processor (XLA,
// its Eigen, torch, MKL, oneDNN) take what they have for AVX2: flags of one library leave the others', and XLA's own dense
// products, on AVX-512. CPUID is made to fault, and answered with the bits cleared.
//
//   gcc -shared -fPIC -o /tmp/without_avx512.so scripts/without_avx512.c
//   export CC="gcc -mno-avx512f"            # what deepseek_kernels compiles with; gcc itself cannot run under this
//   python -c "from deepseek_kernels import cpu; cpu.available()"
//   LD_PRELOAD=/tmp/without_avx512.so python -m deepseek_kernels.bench_cpu
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { ARCH_SET_CPUID = 0x1012 };

static long allow(long yes) {  // by hand: libc's syscall would set errno of the code that was interrupted
  long result;
  __asm__ volatile("syscall" : "=a"(result) : "a"(SYS_arch_prctl), "D"(ARCH_SET_CPUID), "S"(yes) : "rcx", "r11", "memory");
  return result;
}

static void answer(int signal_number, siginfo_t *info, void *context) {
  (void)info;
  greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *code = (const void *)r[REG_RIP];
  if (code[0] != 0x0f || code[1] != 0xa2) {  // not CPUID: what it would have been
    signal(signal_number, SIG_DFL);
    return;
  }
  uint32_t leaf = (uint32_t)r[REG_RAX], part = (uint32_t)r[REG_RCX], a = leaf, b, c = part, d;
  allow(1);
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  allow(0);
  if (leaf == 7 && part == 0) {
    b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31);  // F DQ IFMA … VL
    c &= ~(1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14);  // VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
    d &= ~(1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);  // …, AMX, FP16
  }
  if (leaf == 7 && part == 1) a &= ~(1u << 4 | 1u << 5 | 1u << 21 | 1u << 23), d = 0;  // AVX-VNNI, BF16, AMX-FP16, IFMA
  r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d, r[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(SIGSEGV, &action, NULL);
  if (allow(0)) _exit(99);  // this processor cannot
}
