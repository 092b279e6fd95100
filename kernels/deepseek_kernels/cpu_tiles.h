// The products of cpu_few.h with a weight in bfloat16, by AMX's tiles: 16 × 32 numbers times 32 × 16 in one instruction.
//
// A float32 is the sum of three bfloat16, cut off its bits and exact: so x is given as three terms, every product is the
// same as in float32, and the sums are float32's. A weight is read once, 64 of what it makes new at a time: what lies across
// is a tile as it is; of what lies along two rows are woven, as the instruction takes them, on their way into the cache.
#pragma once
#include "cpu_few.h"

#if defined __AMX_TILE__ && defined __AMX_BF16__ && defined __AVX512BW__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 16, DEPTH = 32, TILE_BYTES = 1024, TERMS = 3, BLOCK = 4, KEPT_TILES = 4, SOON = 3 };

typedef struct {
  Few few;
  char *x;  // [group][K / DEPTH][TERMS] tiles
  int64_t groups, blocks;  // of rows; of BLOCK tiles of the weight in a task
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

// Sums 0…3 += a group's tiles of 32 k, in registers 4 and 5, times four of the weight, in 6 and 7.
#define TERM_TIMES(n, x, w) \
  if (across) _tile_dpbf16ps(n, w, x); \
  else _tile_dpbf16ps(n, x, w);
#define TERM(t, x_tile)                                   \
  _tile_loadd(x_tile, x + t * TILE_BYTES, 64);            \
  _tile_loadd(6, w[0], stride); TERM_TIMES(0, x_tile, 6)  \
  _tile_loadd(7, w[1], stride); TERM_TIMES(1, x_tile, 7)  \
  _tile_loadd(6, w[2], stride); TERM_TIMES(2, x_tile, 6)  \
  _tile_loadd(7, w[3], stride); TERM_TIMES(3, x_tile, 7)
static inline __attribute__((always_inline)) void add_tiles(const char *const *w, int64_t stride, const char *x,
                                                            const int across) {
  TERM(0, 4) TERM(1, 5) TERM(2, 4)
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

// Columns j… of all rows. Rows of the weight come from memory with the first group, woven one step ahead of the product.
static void block_along(const Tiles *p, int64_t j, char *woven, float *sums) {
  const Few *f = &p->few;
  int64_t deep = f->K / DEPTH, step = f->N * 2, wide = least(64, f->N - j), keep = p->groups > 1 ? deep : KEPT_TILES;
  const char *w = f->w + j * 2;
  for (int64_t g = 0; g < p->groups; g++) {
    no_sums();
    if (!g) weave_rows(w, step, wide, woven);
    for (int64_t k = 0; k < deep; k++) {
      if (!g && k + 1 < deep) {
        int64_t soon = k + SOON;
        const char *next = soon < deep ? w + soon * DEPTH * step : w + 128 + (soon - deep) * DEPTH * step;
        for (int i = 0; i < DEPTH; i++) __builtin_prefetch(next + i * step), __builtin_prefetch(next + i * step + 64);
        weave_rows(w + (k + 1) * DEPTH * step, step, wide, woven + (k + 1) % keep * BLOCK * TILE_BYTES);
      }
      __asm__ volatile("" ::: "memory");
      const char *here = woven + k % keep * BLOCK * TILE_BYTES;
      const char *tiles[BLOCK] = {here, here + TILE_BYTES, here + 2 * TILE_BYTES, here + 3 * TILE_BYTES};
      add_tiles(tiles, 64, p->x + (g * deep + k) * TERMS * TILE_BYTES, 0);
    }
    keep_sums(sums);
    const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i second = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
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
static void block_across(const Tiles *p, int64_t j, float *sums) {
  const Few *f = &p->few;
  int64_t deep = f->K / DEPTH, step = f->K * 2, tiles = least(64, f->N - j) / SIDE;
  for (int64_t g = 0; g < p->groups; g++) {
    const char *w[BLOCK];
    for (int64_t n = 0; n < BLOCK; n++) w[n] = f->w + (j + (n < tiles ? n : 0) * SIDE) * step;
    const char *next = w[0] + 64 * step;
    no_sums();
    for (int64_t k = 0; k < deep; k++) {
      for (int i = 0; i < 64 && !g; i++) __builtin_prefetch(next + k * 4096 + i * 64);
      add_tiles(w, step, p->x + (g * deep + k) * TERMS * TILE_BYTES, 1);
      for (int n = 0; n < BLOCK; n++) w[n] += 64;
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
  const Tiles *p = job;
  static const struct {
    uint8_t palette, start_row, none[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  float sums[BLOCK * 256] __attribute__((aligned(64)));
  char *woven = p->across ? NULL : (char *)borrow(least(p->groups > 1 ? p->few.K / DEPTH : KEPT_TILES, 1 << 30) * BLOCK * 256);
  _tile_loadconfig(&tiles);
  for (int64_t b = task * p->blocks; b < least((task + 1) * p->blocks, pieces(p->few.N, 64)); b++) {
    if (p->across) block_across(p, b * 64, sums);
    else block_along(p, b * 64, woven, sums);
  }
  _tile_release();
  if (woven) give_back((float *)woven);
}

static void run_tiles(XLA_FFI_CallFrame *frame, const Few *f, int across) {
  Tiles p = {.few = *f, .groups = pieces(f->R, SIDE), .across = across};
  int64_t all = pieces(f->N, 64), work = f->R * f->K * f->N;
  p.x = aligned_alloc(64, (size_t)(p.groups * (f->K / DEPTH) * TERMS * TILE_BYTES));
  p.blocks = least(4, pieces(all, 8));
  run(frame, split_rows, &p, p.groups, f->R * f->K);
  run(frame, few_by_tiles, &p, pieces(all, p.blocks), work);
  free(p.x);
}
#else
static int tiles_allowed(void) { return 0; }
static void run_tiles(XLA_FFI_CallFrame *frame, const Few *f, int across) { (void)frame, (void)f, (void)across; }
#endif
