// The products of cpu_few.h with a weight in bfloat16, by AMX's tiles: 16 × 32 numbers times 32 × 16 in one instruction.
//
// A float32 is the sum of three bfloat16, cut off its bits and exact: so x is given as three terms, every product is the
// same as in float32, and the sums are float32's. But terms and products below 2^-126 are nothing, and times an infinite
// weight the terms that are 0 make NaN.
//
// A weight is read once, 64 of what it makes new at a time: what lies across is a tile as it is; of what lies along two
// rows are woven, as the instruction takes them, on their way into the cache.
#pragma once
#include "cpu_few.h"

// gcc's names, and older clang's; gcc -mno-amx-tile leaves the other one defined.
#if (defined __AMX_TILE__ || defined __AMXTILE__) && (defined __AMX_BF16__ || defined __AMXBF16__) && defined __AVX512BW__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// NEAR: bytes of x that stay in a core's cache while a weight's columns go by.
enum { SIDE = 16, DEPTH = 32, TILE_BYTES = 1024, TERMS = 3, BLOCK = 4, WIDTH = 64, KEPT_TILES = 4, SOON = 3, NEAR = 3 << 18 };

typedef struct {
  Few few;
  char *x;  // [group][K / DEPTH][TERMS] tiles
  int64_t groups, near, strips, blocks;  // of rows, and of a task; of columns, and WIDTH ones in a task
  int across;
} Tiles;

// A process asks Linux once whether its threads may have the tiles' registers.
static int tiles_allowed(void) {
  static int known;
  int answer = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (!answer) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    answer = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? -1 : 1;
    __atomic_store_n(&known, answer, __ATOMIC_RELAXED);
  }
  return answer > 0;
}

// 16 numbers' terms to three rows, TILE_BYTES apart. What is infinite has no rest.
static inline void split(const float *x, char *to) {
  __m512 rest = _mm512_loadu_ps(x);
  for (int t = 0; t < TERMS; t++) {
    __m512i bits = _mm512_castps_si512(rest);
    _mm256_storeu_si256((__m256i *)(to + t * TILE_BYTES), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    __m512 term = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000u)));
    rest = _mm512_maskz_sub_ps(_mm512_cmp_ps_mask(rest, term, _CMP_NEQ_UQ), rest, term);
  }
}

// A task: a group of rows. Their tiles are (rows × pairs of k), or turned where they stand on the right.
static void split_rows(void *job, int64_t g) {
  Tiles *p = job;
  const Few *f = &p->few;
  int64_t K = f->K, rows = least(SIDE, f->R - g * SIDE);
  char tiles[TERMS * TILE_BYTES] __attribute__((aligned(64)));
  char *to = p->x + g * (K / DEPTH) * TERMS * TILE_BYTES;
  memset(tiles, 0, sizeof tiles);
  for (int64_t k = 0; k < K; k += DEPTH, to += TERMS * TILE_BYTES) {
    for (int64_t i = 0; i < 2 * rows; i++)
      split(f->x + (g * SIDE + i / 2) * K + k + i % 2 * 16, (p->across ? tiles : to) + i * 32);
    for (int t = 0; t < TERMS; t++) {
      if (p->across) turn((float *)(to + t * TILE_BYTES), SIDE, (float *)(tiles + t * TILE_BYTES), SIDE);
      else memset(to + t * TILE_BYTES + rows * 64, 0, (size_t)(TILE_BYTES - rows * 64));
    }
  }
}

// 32 rows of a weight, `step` bytes apart, of `wide` columns, to tiles of pairs; a tile of two has of each 8 columns 4.
static inline void weave_rows(const char *w, int64_t step, int64_t wide, char *to) {
  for (int64_t i = 0; i < DEPTH / 2; i++, w += 2 * step, to += 64)
    for (int64_t j = 0; j < wide / 32; j++) {
      __m512i a = _mm512_loadu_si512(w + j * 64), b = _mm512_loadu_si512(w + step + j * 64);
      _mm512_store_si512(to + 2 * j * TILE_BYTES, _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to + (2 * j + 1) * TILE_BYTES, _mm512_unpackhi_epi16(a, b));
    }
}

static inline void ask_for_rows(const char *w, int64_t step) {
  for (int i = 0; i < DEPTH; i++) {
    __builtin_prefetch(w + i * step);
    __builtin_prefetch(w + i * step + 64);
  }
}

// Sums 0…3 += a group's tiles of 32 k, in registers 4 to 6, times four of the weight, one after the other in 7.
#define TIMES(n, x)                          \
  if (across) _tile_dpbf16ps(n, 7, x); \
  else _tile_dpbf16ps(n, x, 7);
#define COLUMN(n) _tile_loadd(7, w[n], stride); TIMES(n, 4) TIMES(n, 5) TIMES(n, 6)
static inline __attribute__((always_inline)) void add_tiles(const char *const *w, int64_t stride, const char *x,
                                                            const int across) {
  _tile_loadd(4, x, 64);
  _tile_loadd(5, x + TILE_BYTES, 64);
  _tile_loadd(6, x + 2 * TILE_BYTES, 64);
  COLUMN(0) COLUMN(1) COLUMN(2) COLUMN(3)
}

static inline void keep_sums(float *sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
  __asm__ volatile("" ::: "memory");
}

static inline void no_sums(void) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Columns j… of the groups g0…g1-1. Rows of the weight come from memory with the first one, woven a step ahead.
static void block_along(const Tiles *p, int64_t g0, int64_t g1, int64_t j, char *woven, float *sums) {
  const Few *f = &p->few;
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i second = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  int64_t deep = f->K / DEPTH, step = f->N * 2, wide = least(WIDTH, f->N - j), keep = g1 - g0 > 1 ? deep : KEPT_TILES;
  const char *w = f->w + j * 2;
  for (int64_t g = g0; g < g1; g++) {
    no_sums();
    if (g == g0) weave_rows(w, step, wide, woven);
    for (int64_t k = 0; k < deep; k++) {
      if (g == g0 && k + 1 < deep) {
        ask_for_rows(w + (k + SOON < deep ? (k + SOON) * DEPTH * step : 2 * WIDTH + (k + SOON - deep) * DEPTH * step), step);
        weave_rows(w + (k + 1) * DEPTH * step, step, wide, woven + (k + 1) % keep * BLOCK * TILE_BYTES);
      }
      __asm__ volatile("" ::: "memory");
      const char *here = woven + k % keep * BLOCK * TILE_BYTES;
      const char *tiles[BLOCK] = {here, here + TILE_BYTES, here + 2 * TILE_BYTES, here + 3 * TILE_BYTES};
      add_tiles(tiles, 64, p->x + (g * deep + k) * TERMS * TILE_BYTES, 0);
    }
    keep_sums(sums);
    for (int64_t i = 0; i < least(SIDE, f->R - g * SIDE); i++)
      for (int64_t n = 0; n < wide / 32; n++) {
        __m512 a = _mm512_loadu_ps(sums + n * 512 + i * SIDE), b = _mm512_loadu_ps(sums + n * 512 + 256 + i * SIDE);
        float *to = f->out + (g * SIDE + i) * f->N + j + n * 32;
        _mm512_storeu_ps(to, _mm512_permutex2var_ps(a, first, b));
        _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(a, second, b));
      }
  }
}

// The same of a weight whose rows are the columns. Where there are 32 alone the other tiles' sums are for nobody.
static void block_across(const Tiles *p, int64_t g0, int64_t g1, int64_t j, float *sums) {
  const Few *f = &p->few;
  int64_t deep = f->K / DEPTH, step = f->K * 2, tiles = least(WIDTH, f->N - j) / SIDE;
  for (int64_t g = g0; g < g1; g++) {
    const char *w[BLOCK];
    for (int64_t n = 0; n < BLOCK; n++) w[n] = f->w + (j + (n < tiles ? n : 0) * SIDE) * step;
    no_sums();
    for (int64_t k = 0; k < deep; k++) {
      add_tiles(w, step, p->x + (g * deep + k) * TERMS * TILE_BYTES, 1);
      for (int n = 0; n < BLOCK; n++) w[n] += 2 * DEPTH;
    }
    keep_sums(sums);
    for (int64_t n = 0; n < tiles; n++) {
      float turned[SIDE * SIDE] __attribute__((aligned(64)));
      turn(turned, SIDE, sums + n * 256, SIDE);
      for (int64_t i = 0; i < least(SIDE, f->R - g * SIDE); i++)
        memcpy(f->out + (g * SIDE + i) * f->N + j + n * SIDE, turned + i * SIDE, 64);
    }
  }
}

static void few_by_tiles(void *job, int64_t task) {
  static const struct {
    uint8_t palette, start_row, none[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } whole_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  const Tiles *p = job;
  int64_t g0 = task / p->strips * p->near, g1 = least(g0 + p->near, p->groups), first = task % p->strips * p->blocks;
  float sums[BLOCK * 256] __attribute__((aligned(64)));
  char *woven = (char *)borrow(pieces(p->few.K, DEPTH) * BLOCK * TILE_BYTES / 4 + KEPT_TILES * BLOCK * TILE_BYTES / 4);
  _tile_loadconfig(&whole_tiles);
  for (int64_t j = first * WIDTH; j < least((first + p->blocks) * WIDTH, p->few.N); j += WIDTH) {
    if (p->across) block_across(p, g0, g1, j, sums);
    else block_along(p, g0, g1, j, woven, sums);
  }
  _tile_release();
  give_back((float *)woven);
}

static void run_tiles(XLA_FFI_CallFrame *frame, const Few *f, int across) {
  int64_t group = f->K / DEPTH * TERMS * TILE_BYTES, blocks = pieces(f->N, WIDTH);
  Tiles p = {.few = *f, .groups = pieces(f->R, SIDE), .blocks = least(4, pieces(blocks, 8)), .across = across};
  p.near = NEAR / group > 4 ? NEAR / group : 4;
  p.x = aligned_alloc(64, (size_t)(p.groups * group));
  run(frame, split_rows, &p, p.groups, f->R * f->K);
  p.strips = pieces(blocks, p.blocks);
  run(frame, few_by_tiles, &p, pieces(p.groups, p.near) * p.strips, f->R * f->K * f->N);
  free(p.x);
}
#else
static int tiles_allowed(void) { return 0; }
static void run_tiles(XLA_FFI_CallFrame *frame, const Few *f, int across) { (void)frame, (void)f, (void)across; }
#endif
