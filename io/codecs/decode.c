/* Decodes small codes that share the scales of their blocks, and packed bfloat16: what
   tiles.py does, in loops that a compiler vectorises. Each product is rounded as torch
   rounds it. */

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#define HAS_AVX2
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

enum dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum kind { TABLE, INT8, FLOAT8_E4M3 };

#define SPAN 512  /* numbers of a row that are decoded at a time: even */
#define HEIGHT 128 /* rows of a tile that is turned before it is written */
#define WIDTH 64   /* and its columns */

/* `_Job` in compiled.py. */
struct job {
    const uint8_t *codes;
    int64_t code_stride;  /* bytes from a row to the next */
    const float *table;   /* the numbers that the codes mean */
    const float *scales;  /* [blocks down, blocks across] */
    const float *offsets; /* like scales, or NULL */
    int64_t rows, columns;
    int64_t block_rows, block_columns; /* block_rows is 0 if all rows share theirs */
    void *target;
    int64_t row_stride, column_stride; /* elements */
    int32_t per_byte;                  /* numbers in a byte: 1 or 2 */
    int32_t kind;                      /* of codes that need no table */
    int32_t rounding, dtype;
};

static inline uint16_t bfloat16_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t rounded = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

static inline float float_of(uint16_t bfloat16)
{
    uint32_t bits = (uint32_t)bfloat16 << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Writes `(number - offset) * scale` of one block: codes of a byte each. */
static inline void decode_bytes(const uint8_t *restrict codes, const float *restrict table,
                                int64_t n, float offset, float scale, float *restrict out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = (table[codes[i]] - offset) * scale;
}

static inline void decode_int8(const uint8_t *restrict codes, int64_t n, float offset,
                               float scale, float *restrict out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = ((float)(int8_t)codes[i] - offset) * scale;
}

/* The fields of e4m3 are those of a 16-bit float with another bias; only NaN is not. */
static inline void decode_e4m3(const uint8_t *restrict codes, const float *restrict table,
                               int64_t n, float offset, float scale, float *restrict out)
{
    int64_t i = 0;
#ifdef HAS_AVX2
    const __m256i low = _mm256_set1_epi16(0x7f), top = _mm256_set1_epi16(INT16_MIN);
    const __m256i nan = _mm256_set1_epi16(0x7e00);
    const __m256 bias = _mm256_set1_ps(256);
    __m256 offsets = _mm256_set1_ps(offset), scales = _mm256_set1_ps(scale);
    for (; i + 16 <= n; i += 16) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)(codes + i));
        __m256i code = _mm256_cvtepu8_epi16(bytes), size = _mm256_and_si256(code, low);
        __m256i half = _mm256_and_si256(_mm256_slli_epi16(code, 8), top);
        half = _mm256_or_si256(half, _mm256_slli_epi16(size, 7));
        __m256i is_nan = _mm256_cmpeq_epi16(size, low);
        half = _mm256_or_si256(half, _mm256_and_si256(is_nan, nan));
        __m256 first = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
        __m256 second = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
        first = _mm256_sub_ps(_mm256_mul_ps(first, bias), offsets);
        second = _mm256_sub_ps(_mm256_mul_ps(second, bias), offsets);
        _mm256_storeu_ps(out + i, _mm256_mul_ps(first, scales));
        _mm256_storeu_ps(out + i + 8, _mm256_mul_ps(second, scales));
    }
#endif
    decode_bytes(codes + i, table, n - i, offset, scale, out + i);
}

/* The same for two codes in a byte, from the code `from` on. The 16 products are made
   once, and looked up. */
static inline void decode_halves(const uint8_t *restrict codes, int64_t from,
                                 const float *restrict table, int64_t n, float offset,
                                 float scale, float *restrict out)
{
    float numbers[16];
    for (int i = 0; i < 16; i++)
        numbers[i] = (table[i] - offset) * scale;
    int64_t i = 0;
    if (from % 2 && n)
        out[i++] = numbers[codes[from / 2] >> 4];
    codes += (from + i) / 2;
    int64_t start = i;
#ifdef HAS_AVX2
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i mask = _mm256_set1_epi32(15);
    __m256 low = _mm256_loadu_ps(numbers), high = _mm256_loadu_ps(numbers + 8);
    for (; i + 8 <= n; i += 8) {
        int32_t word;
        memcpy(&word, codes + (i - start) / 2, 4);
        __m256i code = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
        code = _mm256_and_si256(code, mask);
        __m256 first = _mm256_permutevar8x32_ps(low, code);
        __m256 second = _mm256_permutevar8x32_ps(high, code);
        __m256 is_second = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        _mm256_storeu_ps(out + i, _mm256_blendv_ps(first, second, is_second));
    }
#endif
    for (; i + 2 <= n; i += 2) {
        uint8_t both = codes[(i - start) / 2];
        out[i] = numbers[both & 15];
        out[i + 1] = numbers[both >> 4];
    }
    if (i < n)
        out[i] = numbers[codes[(i - start) / 2] & 15];
}

static void round_to(int32_t dtype, int64_t n, float *restrict out)
{
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < n; i++)
            out[i] = float_of(bfloat16_of(out[i]));
#ifdef __FLT16_MANT_DIG__
    if (dtype == FLOAT16)
        for (int64_t i = 0; i < n; i++)
            out[i] = (float)(_Float16)out[i];
#endif
}

/* The numbers `from` ... `from + n` of a row, in float32; `from` is even. */
static void decode_span(const struct job *job, int64_t row, int64_t from, int64_t n,
                        float *out)
{
    int64_t size = job->block_columns, across = (job->columns + size - 1) / size;
    int64_t first = job->block_rows ? row / job->block_rows * across : 0;
    const uint8_t *codes = job->codes + row * job->code_stride + from / job->per_byte;
    int64_t block = first + from / size, left = size - from % size;
    for (int64_t i = 0, num; i < n; i += num, block++, left = size) {
        float scale = job->scales[block];
        float offset = job->offsets ? job->offsets[block] : 0;
        num = left < n - i ? left : n - i;
        if (job->per_byte == 2)
            decode_halves(codes, i, job->table, num, offset, scale, out + i);
        else if (job->kind == INT8)
            decode_int8(codes + i, num, offset, scale, out + i);
        else if (job->kind == FLOAT8_E4M3)
            decode_e4m3(codes + i, job->table, num, offset, scale, out + i);
        else
            decode_bytes(codes + i, job->table, num, offset, scale, out + i);
    }
    if (job->rounding != job->dtype)
        round_to(job->rounding, n, out);
}

static void store(int32_t dtype, int64_t n, const float *restrict from, void *to)
{
    if (dtype == BFLOAT16) {
        uint16_t *restrict halves = to;
        for (int64_t i = 0; i < n; i++)
            halves[i] = bfloat16_of(from[i]);
    }
#ifdef __FLT16_MANT_DIG__
    if (dtype == FLOAT16) {
        _Float16 *restrict halves = to;
        for (int64_t i = 0; i < n; i++)
            halves[i] = (_Float16)from[i];
    }
#endif
}

/* The columns of a row lie side by side. */
static void decode_rows(const struct job *job)
{
    float numbers[SPAN];
    for (int64_t row = 0; row < job->rows; row++) {
        for (int64_t from = 0; from < job->columns; from += SPAN) {
            int64_t n = job->columns - from < SPAN ? job->columns - from : SPAN;
            int64_t at = row * job->row_stride + from;
            if (job->dtype == FLOAT32) {
                decode_span(job, row, from, n, (float *)job->target + at);
            } else {
                decode_span(job, row, from, n, numbers);
                store(job->dtype, n, numbers, (uint16_t *)job->target + at);
            }
        }
    }
}

/* Writes `height` x `n` numbers, turned: `tile` has a row for each column. */
static inline void write_turned(const struct job *job, int64_t row, int64_t from,
                                int64_t height, int64_t n, const char *tile,
                                int64_t size)
{
    for (int64_t j = 0; j < n; j++, tile += HEIGHT * size) {
        int64_t at = row * job->row_stride + (from + j) * job->column_stride;
        char *to = (char *)job->target + at * size;
        if (job->row_stride == 1)
            memcpy(to, tile, height * size);
        else
            for (int64_t i = 0; i < height; i++)
                memcpy(to + i * job->row_stride * size, tile + i * size, size);
    }
}

/* Turns 8 x 8 numbers of 16 bits, or 4 x 4 of 32: `from` has rows of WIDTH numbers, `to`
   of HEIGHT. */
static inline void turn_halves(const uint16_t *restrict from, uint16_t *restrict to)
{
#ifdef __SSE2__
    __m128i a[8], b[8];
    for (int i = 0; i < 8; i++)
        a[i] = _mm_loadu_si128((const __m128i *)(from + i * WIDTH));
    for (int i = 0; i < 4; i++) {
        b[i] = _mm_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
        b[i + 4] = _mm_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4) { /* 4 columns of 8 */
        a[i] = _mm_unpacklo_epi32(b[i], b[i + 1]);
        a[i + 1] = _mm_unpackhi_epi32(b[i], b[i + 1]);
        a[i + 2] = _mm_unpacklo_epi32(b[i + 2], b[i + 3]);
        a[i + 3] = _mm_unpackhi_epi32(b[i + 2], b[i + 3]);
        for (int j = 0; j < 2; j++, to += 2 * HEIGHT) {
            __m128i low = _mm_unpacklo_epi64(a[i + j], a[i + j + 2]);
            __m128i high = _mm_unpackhi_epi64(a[i + j], a[i + j + 2]);
            _mm_storeu_si128((__m128i *)to, low);
            _mm_storeu_si128((__m128i *)(to + HEIGHT), high);
        }
    }
#else
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++)
            to[j * HEIGHT + i] = from[i * WIDTH + j];
#endif
}

static inline void turn_floats(const float *restrict from, float *restrict to)
{
#ifdef __SSE2__
    __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + WIDTH);
    __m128 c = _mm_loadu_ps(from + 2 * WIDTH), d = _mm_loadu_ps(from + 3 * WIDTH);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(to, a);
    _mm_storeu_ps(to + HEIGHT, b);
    _mm_storeu_ps(to + 2 * HEIGHT, c);
    _mm_storeu_ps(to + 3 * HEIGHT, d);
#else
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++)
            to[j * HEIGHT + i] = from[i * WIDTH + j];
#endif
}

/* They do not: `tile` is decoded, `turned`, and written. */
static void decode_turned_halves(const struct job *job)
{
    float numbers[WIDTH];
    uint16_t tile[HEIGHT][WIDTH] = {0}, turned[WIDTH][HEIGHT];
    for (int64_t row = 0; row < job->rows; row += HEIGHT) {
        int64_t height = job->rows - row < HEIGHT ? job->rows - row : HEIGHT;
        for (int64_t from = 0; from < job->columns; from += WIDTH) {
            int64_t n = job->columns - from < WIDTH ? job->columns - from : WIDTH;
            for (int64_t i = 0; i < height; i++) {
                decode_span(job, row + i, from, n, numbers);
                store(job->dtype, n, numbers, tile[i]);
            }
            for (int64_t j = 0; j < n; j += 8)
                for (int64_t i = 0; i < height; i += 8)
                    turn_halves(&tile[i][j], &turned[j][i]);
            write_turned(job, row, from, height, n, (char *)turned, 2);
        }
    }
}

static void decode_turned_floats(const struct job *job)
{
    float tile[HEIGHT][WIDTH] = {0}, turned[WIDTH][HEIGHT];
    for (int64_t row = 0; row < job->rows; row += HEIGHT) {
        int64_t height = job->rows - row < HEIGHT ? job->rows - row : HEIGHT;
        for (int64_t from = 0; from < job->columns; from += WIDTH) {
            int64_t n = job->columns - from < WIDTH ? job->columns - from : WIDTH;
            for (int64_t i = 0; i < height; i++)
                decode_span(job, row + i, from, n, tile[i]);
            for (int64_t j = 0; j < n; j += 4)
                for (int64_t i = 0; i < height; i += 4)
                    turn_floats(&tile[i][j], &turned[j][i]);
            write_turned(job, row, from, height, n, (char *)turned, 4);
        }
    }
}

/* Whether this compiler has 16-bit floats. */
int32_t penstock_has_float16(void)
{
#ifdef __FLT16_MANT_DIG__
    return 1;
#else
    return 0;
#endif
}

void penstock_decode(const struct job *job)
{
    if (job->column_stride == 1)
        decode_rows(job);
    else if (job->dtype == FLOAT32)
        decode_turned_floats(job);
    else
        decode_turned_halves(job);
}

/* `_Packed` in compiled.py. */
struct packed {
    const uint8_t *bytes; /* see `PackedFloats` in kernels.py */
    int64_t byte_stride;  /* bytes from a row to the next */
    const void *escapes;  /* [blocks, most_escapes], 32 bits each, or NULL */
    int64_t most_escapes, block_rows;
    int64_t rows, columns;
    void *target;
    int64_t row_stride; /* elements; columns lie side by side */
    int32_t dtype;      /* FLOAT32 or BFLOAT16 */
};

static inline uint16_t joined(uint8_t rest, uint8_t exponent)
{
    return (uint16_t)((rest & 0x80) << 8 | exponent << 7 | (rest & 0x7f));
}

static inline uint8_t exponent_of(uint8_t code, uint8_t other, uint8_t base)
{
    return code ? (uint8_t)(base + code) : other;
}

static inline void unpack_bfloat16(const uint8_t *restrict rest,
                                   const uint8_t *restrict codes, int shift,
                                   uint8_t other, uint8_t base, int64_t n,
                                   uint16_t *restrict out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = joined(rest[i], exponent_of((codes[i] >> shift) & 15, other, base));
}

static inline void unpack_float32(const uint8_t *restrict rest,
                                  const uint8_t *restrict codes, int shift,
                                  uint8_t other, uint8_t base, int64_t n,
                                  uint32_t *restrict out)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = (uint32_t)joined(rest[i], exponent_of((codes[i] >> shift) & 15, other,
                                                       base))
                 << 16;
}

/* Writes the numbers whose exponents are listed apart. */
static void write_escapes(const struct packed *job)
{
    const char *word = job->escapes;
    for (int64_t first = 0; first < job->rows; first += job->block_rows) {
        int64_t left = job->rows - first;
        int64_t rows = left < job->block_rows ? left : job->block_rows;
        for (int64_t i = 0; i < job->most_escapes; i++, word += 4) {
            uint32_t found;
            memcpy(&found, word, 4);
            int64_t row = (found >> 8) / job->columns;
            int64_t column = (found >> 8) % job->columns;
            if (row >= rows)
                continue;
            row += first;
            uint8_t rest = job->bytes[row * job->byte_stride + column];
            uint16_t bits = joined(rest, (uint8_t)found);
            int64_t at = row * job->row_stride + column;
            if (job->dtype == FLOAT32)
                ((uint32_t *)job->target)[at] = (uint32_t)bits << 16;
            else
                ((uint16_t *)job->target)[at] = bits;
        }
    }
}

void penstock_unpack(const struct packed *job)
{
    int64_t left = (job->columns + 1) / 2, right = job->columns / 2;
    for (int64_t row = 0; row < job->rows; row++) {
        const uint8_t *rest = job->bytes + row * job->byte_stride;
        const uint8_t *codes = rest + job->columns;
        uint8_t other = codes[left], base = codes[left + 1];
        if (job->dtype == FLOAT32) {
            uint32_t *out = (uint32_t *)job->target + row * job->row_stride;
            unpack_float32(rest, codes, 0, other, base, left, out);
            unpack_float32(rest + left, codes, 4, other, base, right, out + left);
        } else {
            uint16_t *out = (uint16_t *)job->target + row * job->row_stride;
            unpack_bfloat16(rest, codes, 0, other, base, left, out);
            unpack_bfloat16(rest + left, codes, 4, other, base, right, out + left);
        }
    }
    if (job->escapes)
        write_escapes(job);
}
