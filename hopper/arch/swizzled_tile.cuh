// A tile of bytes in shared memory as TMA and wgmma lay it out, for threads that address it themselves.

#pragma once

namespace flash8 {

// TMA writes a tile in panels of one swizzle row: the widest of 128, 64 and 32 bytes that divides its rows.
constexpr int panel_bytes(int row_bytes) {
    return row_bytes % 128 == 0 ? 128 : row_bytes % 64 == 0 ? 64 : 32;
}

// Byte offsets in a tile of kRows rows, in panels of kPanel bytes: the 16-byte chunks of a panel's row are
// permuted by an exclusive or.
template <int kRows, int kPanel>
struct SwizzledTile {
    __device__ __forceinline__ static int offset(int row, int byte) {
        int const twist = row * kPanel / 128 % (kPanel / 16);
        return byte / kPanel * kRows * kPanel + row * kPanel + (byte % kPanel ^ twist * 16);
    }

    // The same row, `columns` bytes further. The column of `offset` and `columns` must share no bit.
    __device__ __forceinline__ static int advance(int offset, int columns) {
        return (offset ^ columns % kPanel) + columns / kPanel * kRows * kPanel;
    }
};

}  // namespace flash8
