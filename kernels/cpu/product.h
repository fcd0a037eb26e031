// Matrix products: C [M, N] (+)= A [M, K] B [K, N], in Compute<T>, by oneDNN's brgemm out of torch where it is there, else by
// a register-blocked loop of our own; and the layouts that their operands need.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "number.h"
#include "vector.h"

namespace fusedres {

// at::native::cpublas::brgemm, found by name when the library is loaded; null where torch does not have it.
using Brgemm = void (*)(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const void *A,
                        const void *B, float *C, bool is_vnni);
extern Brgemm brgemm_float, brgemm_bfloat16;
extern void (*brgemm_release)(bool is_vnni);

// bfloat16 products take B in pairs along the depth, [K / 2][N][2], so depths are even, the last one zero where K is odd.
template <class T>
constexpr bool IN_PAIRS = std::is_same_v<T, bfloat16>;
template <class T>
constexpr int64_t even(int64_t size) {
    return IN_PAIRS<T> ? (size + 1) / 2 * 2 : size;
}

// ------------------------------------------------------------------------------------------------ our own

// ROWS × VECTORS of C in registers. A's element (i, k) lies at i * a_row + k * a_depth.
template <class C, int ROWS, int VECTORS>
inline void micro_product(int64_t K, const C *A, int64_t a_row, int64_t a_depth, const C *B, int64_t ldb, C *to,
                          int64_t ldc, bool add) {
    constexpr int W = LANES<C>;
    Vector<C> sums[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < K; k++) {
        Vector<C> b[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) b[j] = load(B + k * ldb + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            C a = A[i * a_row + k * a_depth];
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; j++) sums[i][j] += a * b[j];
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) {
            C *at = to + i * ldc + j * W;
            store(at, add ? load(at) + sums[i][j] : sums[i][j]);
        }
}

template <class C, int VECTORS>
void product_columns(int64_t M, int64_t K, const C *A, int64_t a_row, int64_t a_depth, const C *B, int64_t ldb, C *to,
                     int64_t ldc, bool add) {
    int64_t m = 0;
    for (; m + MICRO_ROWS <= M; m += MICRO_ROWS)
        micro_product<C, MICRO_ROWS, VECTORS>(K, A + m * a_row, a_row, a_depth, B, ldb, to + m * ldc, ldc, add);
    for (; m < M; m++) micro_product<C, 1, VECTORS>(K, A + m * a_row, a_row, a_depth, B, ldb, to + m * ldc, ldc, add);
}

// The last columns, fewer than a vector: through padded copies, a slice of the depth at a time.
template <class C>
void product_last_columns(int64_t M, int64_t N, int64_t K, const C *A, int64_t a_row, int64_t a_depth, const C *B,
                          int64_t ldb, C *to, int64_t ldc, bool add) {
    constexpr int W = LANES<C>, DEPTH = 128;
    C b[DEPTH * W], c[MICRO_ROWS * W];
    for (int64_t k0 = 0; k0 < K; k0 += DEPTH, add = true) {
        int64_t depth = std::min<int64_t>(DEPTH, K - k0);
        for (int64_t k = 0; k < depth; k++)
            for (int64_t n = 0; n < W; n++) b[k * W + n] = n < N ? B[(k0 + k) * ldb + n] : C(0);
        for (int64_t m = 0; m < M; m += MICRO_ROWS) {
            int64_t rows = std::min<int64_t>(MICRO_ROWS, M - m);
            product_columns<C, 1>(rows, depth, A + m * a_row + k0 * a_depth, a_row, a_depth, b, W, c, W, false);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t n = 0; n < N; n++) {
                    C &sum = to[(m + i) * ldc + n];
                    sum = add ? sum + c[i * W + n] : c[i * W + n];
                }
        }
    }
}

// A's element (i, k) lies at i * a_row + k * a_depth: a transposed A is as good as any.
template <class C>
void own_product(int64_t M, int64_t N, int64_t K, const C *A, int64_t a_row, int64_t a_depth, const C *B, int64_t ldb,
                 C *to, int64_t ldc, bool add) {
    constexpr int W = LANES<C>;
    int64_t n = 0;
    for (; n + MICRO_VECTORS * W <= N; n += MICRO_VECTORS * W)
        product_columns<C, MICRO_VECTORS>(M, K, A, a_row, a_depth, B + n, ldb, to + n, ldc, add);
    for (; n + W <= N; n += W) product_columns<C, 1>(M, K, A, a_row, a_depth, B + n, ldb, to + n, ldc, add);
    if (n < N) product_last_columns<C>(M, N - n, K, A, a_row, a_depth, B + n, ldb, to + n, ldc, add);
}

// ------------------------------------------------------------------------------------------------ either

template <class T>
void multiply(bool has_brgemm, int64_t M, int64_t N, int64_t K, const T *A, int64_t lda, const T *B, int64_t ldb, T *to,
              int64_t ldc, bool add) {
    if constexpr (std::is_same_v<T, float>) {
        if (has_brgemm) return brgemm_float(M, N, K, lda, ldb, ldc, add, A, B, to, false);
    }
    own_product<T>(M, N, K, A, lda, 1, B, ldb, to, ldc, add);
}

constexpr int64_t SUMMED = 512;  // products in a row: a longer sum would round each of them as it rounds its end

// B as `pack_*` leaves it. Depths of bfloat16 are even.
template <class T>
void product(bool has_brgemm, int64_t M, int64_t N, int64_t K, const T *A, int64_t lda, const T *B, int64_t ldb,
             Compute<T> *to, int64_t ldc, bool add) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        brgemm_bfloat16(M, N, K, lda, ldb, ldc, add, A, B, to, true);
    } else {
        int64_t k = 0;
        do {  // once for no depth, too: zeros may have to be written
            const int64_t depth = std::min(SUMMED, K - k);
            multiply<T>(has_brgemm, M, N, depth, A + k, lda, B + k * ldb, ldb, to, ldc, add);
            k += depth, add = true;
        } while (k < K);
    }
}

// ------------------------------------------------------------------------------------------------ layouts

// to [columns][rows] = from [rows][columns], of 4- or 8-byte numbers
template <class C>
void transpose(const C *from, int64_t ld, int64_t rows, int64_t columns, C *to, int64_t ldt) {
    constexpr int W = LANES<C>;
    for (int64_t r = 0; r < rows; r += W)
        for (int64_t c = 0; c < columns; c += W) {
            if (r + W <= rows && c + W <= columns) {
                Vector<C> square[W];
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) square[i] = load(from + (r + i) * ld + c);
                transpose_square<C>(square);
#pragma GCC unroll 16
                for (int i = 0; i < W; i++) store(to + (c + i) * ldt + r, square[i]);
            } else {
                for (int64_t j = c; j < std::min(c + W, columns); j++)
                    for (int64_t i = r; i < std::min(r + W, rows); i++) to[j * ldt + i] = from[i * ld + j];
            }
        }
}

// Rows 2k and 2k + 1 of a matrix of bfloat16, number by number side by side: to [rows / 2][columns][2]. Rows from `given` on
// are zero.
inline void pair_rows(const bfloat16 *from, int64_t ld, int64_t given, int64_t rows, int64_t columns, uint32_t *to) {
    for (int64_t k = 0; k < rows; k += 2, to += columns) {
        const bfloat16 *low = from + k * ld, *high = low + ld;
        if (k + 1 < given)
            for (int64_t n = 0; n < columns; n++) to[n] = uint32_t(low[n].bits) | uint32_t(high[n].bits) << 16;
        else if (k < given)
            for (int64_t n = 0; n < columns; n++) to[n] = low[n].bits;
        else
            std::fill(to, to + columns, 0u);
    }
}

// to [columns][depth] = from [rows][columns], zero from row `rows` on: the A of a product with dzᵀ. The depth is even.
template <class T>
void turn(const T *from, int64_t ld, int64_t rows, int64_t depth, int64_t columns, T *to) {
    if constexpr (IN_PAIRS<T>) {
        constexpr int64_t STRIP = 32;  // rows at a time, paired in the nearest cache
        uint32_t pairs[STRIP / 2 * 64];
        for (int64_t c = 0; c < columns; c += 64)
            for (int64_t r = 0; r < depth; r += STRIP) {
                const int64_t width = std::min<int64_t>(64, columns - c), some = std::min(STRIP, depth - r);
                pair_rows(from + r * ld + c, ld, std::max<int64_t>(0, rows - r), some, width, pairs);
                transpose<float>(reinterpret_cast<const float *>(pairs), width, some / 2, width,
                                 reinterpret_cast<float *>(to + c * depth + r), depth / 2);
            }
    } else {
        transpose<T>(from, ld, rows, columns, to, depth);
        if (rows < depth)
            for (int64_t n = 0; n < columns; n++) std::fill(to + n * depth + rows, to + (n + 1) * depth, T{});
    }
}

// B [K, N] of a product with Wᵀ: W [N, K], rows ld apart, so that B's columns are W's rows.
template <class T>
void pack_transposed(const T *W, int64_t ld, int64_t N, int64_t K, T *B) {
    if constexpr (IN_PAIRS<T>) {
        // a pair is one number of four bytes, where all rows begin at such a one
        const int64_t paired = ld % 2 == 0 && reinterpret_cast<uintptr_t>(W) % 4 == 0 ? K / 2 : 0;
        transpose<float>(reinterpret_cast<const float *>(W), ld / 2, N, paired, reinterpret_cast<float *>(B), N);
        for (int64_t k = 2 * paired; k < even<T>(K); k++)
            for (int64_t n = 0; n < N; n++) B[(k / 2 * N + n) * 2 + k % 2] = k < K ? W[n * ld + k] : T{};
    } else {
        transpose<T>(W, ld, N, K, B, N);
    }
}

// B [K, N] of a product with a matrix as it lies, rows ld apart; rows from `given` on are zero.
template <class T>
void pack(const T *from, int64_t ld, int64_t given, int64_t K, int64_t N, T *B) {
    if constexpr (IN_PAIRS<T>) {
        pair_rows(from, ld, given, even<T>(K), N, reinterpret_cast<uint32_t *>(B));
    } else {
        for (int64_t k = 0; k < K; k++)
            for (int64_t n = 0; n < N; n++) B[k * N + n] = k < given ? from[k * ld + n] : T{};
    }
}

}  // namespace fusedres
