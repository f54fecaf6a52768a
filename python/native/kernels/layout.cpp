#include "kernels/layout.h"

#include "backward/params.h"
#include "decode/schedule_params.h"
#include "forward/params.h"
#include "gemm_params.h"
#include "kernel_info.h"
#include "matrix_params.h"
#include "qkv_params.h"
#include "quantize/append_params.h"
#include "quantize_params.h"

namespace flash8 {

// FIELD works inside a function whose alias T is the struct.
#define FIELD(name) {#name, offsetof(T, name), sizeof(T::name)}

namespace {

template <class T>
StructLayout layout(const char* name, std::vector<FieldLayout> fields) {
    return {name, sizeof(T), alignof(T), std::move(fields)};
}

StructLayout tensor_map() {
    using T = TensorMap;
    return layout<T>("TensorMap", {FIELD(opaque)});
}

StructLayout tensor_ref() {
    using T = TensorRef;
    return layout<T>("TensorRef", {FIELD(ptr), FIELD(batch_stride), FIELD(row_stride), FIELD(head_stride)});
}

StructLayout descale_ref() {
    using T = DescaleRef;
    return layout<T>("DescaleRef",
                     {FIELD(ptr), FIELD(batch_stride), FIELD(head_stride), FIELD(block_stride)});
}

StructLayout row_ref() {
    using T = RowRef;
    return layout<T>("RowRef", {FIELD(ptr), FIELD(batch_stride), FIELD(head_stride)});
}

StructLayout out_scale_ref() {
    using T = OutScaleRef;
    return layout<T>("OutScaleRef", {FIELD(ptr), FIELD(given), FIELD(row_stride)});
}

StructLayout channel_ref() {
    using T = ChannelRef;
    return layout<T>("ChannelRef", {FIELD(ptr), FIELD(batch_stride), FIELD(head_stride)});
}

StructLayout sequence_params() {
    using T = SequenceParams;
    return layout<T>("SequenceParams",
                     {FIELD(cu_seqlens_q), FIELD(cu_seqlens_k), FIELD(seqused_q), FIELD(seqused_k),
                      FIELD(leftpad_k), FIELD(kv_batch_idx), FIELD(total_q), FIELD(total_k), FIELD(batch),
                      FIELD(batch_k), FIELD(max_seqlen_q), FIELD(max_seqlen_k)});
}

StructLayout page_params() {
    using T = PageParams;
    return layout<T>("PageParams",
                     {FIELD(page_table), FIELD(page_table_stride), FIELD(page_size), FIELD(num_pages),
                      FIELD(max_pages), FIELD(box_rows), FIELD(page_multiplier), FIELD(page_shift)});
}

StructLayout score_params() {
    using T = ScoreParams;
    return layout<T>("ScoreParams", {FIELD(sinks), FIELD(alibi_slopes), FIELD(alibi_batch_stride),
                                     FIELD(softmax_scale), FIELD(softmax_scale_log2), FIELD(softcap),
                                     FIELD(window_left), FIELD(window_right), FIELD(attention_chunk)});
}

StructLayout dropout_params() {
    using T = DropoutParams;
    return layout<T>("DropoutParams", {FIELD(seed), FIELD(threshold), FIELD(keep_scale)});
}

StructLayout scheduler_params() {
    using T = SchedulerParams;
    return layout<T>("SchedulerParams", {FIELD(tile_count), FIELD(max_m_blocks), FIELD(heads_per_section),
                                         FIELD(num_ctas), FIELD(longest_first)});
}

StructLayout forward_params() {
    using T = ForwardParams;
    return layout<T>("ForwardParams", {FIELD(tma_q),
                                       FIELD(tma_k),
                                       FIELD(tma_v),
                                       FIELD(q),
                                       FIELD(k),
                                       FIELD(v),
                                       FIELD(o),
                                       FIELD(lse),
                                       FIELD(q_descale),
                                       FIELD(k_descale),
                                       FIELD(v_descale),
                                       FIELD(k_mean),
                                       FIELD(v_mean),
                                       FIELD(v_channel_descale),
                                       FIELD(sequences),
                                       FIELD(scores),
                                       FIELD(scheduler),
                                       FIELD(heads_q),
                                       FIELD(heads_kv),
                                       FIELD(head_dim),
                                       FIELD(head_dim_v),
                                       FIELD(o_type),
                                       FIELD(heads_per_q_descale),
                                       FIELD(dropout),
                                       FIELD(pages),
                                       FIELD(out_scale)});
}

StructLayout backward_params() {
    using T = BackwardParams;
    return layout<T>("BackwardParams", {FIELD(tma_q),
                                        FIELD(tma_k),
                                        FIELD(tma_v),
                                        FIELD(tma_dout),
                                        FIELD(q),
                                        FIELD(k),
                                        FIELD(v),
                                        FIELD(o),
                                        FIELD(dout),
                                        FIELD(dq),
                                        FIELD(dk),
                                        FIELD(dv),
                                        FIELD(lse),
                                        FIELD(dlse),
                                        FIELD(k_mean),
                                        FIELD(v_mean),
                                        FIELD(q_descale),
                                        FIELD(k_descale),
                                        FIELD(v_descale),
                                        FIELD(row_stats),
                                        FIELD(dq_accum),
                                        FIELD(dq_semaphore),
                                        FIELD(dsinks_partial),
                                        FIELD(dsinks),
                                        FIELD(dkv_partial),
                                        FIELD(q16),
                                        FIELD(key_mean),
                                        FIELD(sequences),
                                        FIELD(scores),
                                        FIELD(scheduler),
                                        FIELD(dropout),
                                        FIELD(query_blocks),
                                        FIELD(key_blocks),
                                        FIELD(max_n_blocks),
                                        FIELD(heads_q),
                                        FIELD(heads_kv),
                                        FIELD(head_dim),
                                        FIELD(head_dim_v),
                                        FIELD(head_splits),
                                        FIELD(heads_per_q_descale),
                                        FIELD(zero),
                                        FIELD(reserved)});
}

StructLayout decode_params() {
    using T = DecodeParams;
    return layout<T>("DecodeParams", {FIELD(tma_k),
                                      FIELD(tma_v),
                                      FIELD(q),
                                      FIELD(qv),
                                      FIELD(k),
                                      FIELD(v),
                                      FIELD(o),
                                      FIELD(lse),
                                      FIELD(q_descale),
                                      FIELD(k_descale),
                                      FIELD(v_descale),
                                      FIELD(k_mean),
                                      FIELD(v_mean),
                                      FIELD(sequences),
                                      FIELD(scores),
                                      FIELD(pages),
                                      FIELD(partials),
                                      FIELD(tickets),
                                      FIELD(tree_mask),
                                      FIELD(tree_mask_stride),
                                      FIELD(scheduler_metadata),
                                      FIELD(heads_q),
                                      FIELD(heads_kv),
                                      FIELD(head_dim),
                                      FIELD(head_dim_v),
                                      FIELD(k_scale_rows),
                                      FIELD(v_scale_rows),
                                      FIELD(q_is_e4m3),
                                      FIELD(heads_per_q_descale),
                                      FIELD(split_keys),
                                      FIELD(reserved),
                                      FIELD(append),
                                      FIELD(zero)});
}

StructLayout schedule_params() {
    using T = ScheduleParams;
    return layout<T>(
        "ScheduleParams",
        {FIELD(call), FIELD(scheduler_metadata), FIELD(cu_seqlens_k_new), FIELD(seqlen_k_new), FIELD(block_m),
         FIELD(tile_head_dim), FIELD(tile_head_dim_v), FIELD(qv), FIELD(element_bytes), FIELD(reserved)});
}

StructLayout group_ref() {
    using T = GroupRef;
    return layout<T>("GroupRef", {FIELD(ptr), FIELD(batch_stride), FIELD(head_stride), FIELD(block_stride)});
}

StructLayout appended_rows() {
    using T = AppendedRows;
    return layout<T>(
        "AppendedRows",
        {FIELD(x), FIELD(out), FIELD(mean), FIELD(descale), FIELD(cu_seqlens), FIELD(norm_weight),
         FIELD(tokens), FIELD(seqlen), FIELD(heads), FIELD(head_dim), FIELD(descale_by_slot), FIELD(rotates),
         FIELD(advances), FIELD(norm_is_fp32), FIELD(norm_eps), FIELD(reserved)});
}

StructLayout rotary_params() {
    using T = RotaryParams;
    return layout<T>("RotaryParams",
                     {FIELD(cos), FIELD(sin), FIELD(offsets), FIELD(cos_stride), FIELD(sin_stride),
                      FIELD(positions), FIELD(rotary_dim), FIELD(interleaved), FIELD(is_fp32)});
}

StructLayout place_params() {
    using T = PlaceParams;
    return layout<T>("PlaceParams",
                     {FIELD(cache_seqlens), FIELD(page_table), FIELD(kv_batch_idx), FIELD(page_table_stride),
                      FIELD(table_rows), FIELD(max_pages), FIELD(num_slots), FIELD(slot_tokens)});
}

StructLayout append_params() {
    using T = AppendParams;
    return layout<T>("AppendParams", {FIELD(rows), FIELD(rotary), FIELD(place), FIELD(lengths), FIELD(batch),
                                      FIELD(reserved)});
}

StructLayout quantize_params() {
    using T = QuantizeParams;
    return layout<T>("QuantizeParams", {FIELD(x),
                                        FIELD(out),
                                        FIELD(mean),
                                        FIELD(mean_rotated),
                                        FIELD(mean_partial),
                                        FIELD(descale),
                                        FIELD(amax),
                                        FIELD(rope_cos),
                                        FIELD(rope_sin),
                                        FIELD(rope_offsets),
                                        FIELD(cu_seqlens),
                                        FIELD(seqused),
                                        FIELD(total),
                                        FIELD(batch),
                                        FIELD(seqlen),
                                        FIELD(heads),
                                        FIELD(head_dim),
                                        FIELD(rope_rows),
                                        FIELD(rotary_dim),
                                        FIELD(interleaved),
                                        FIELD(scale_source),
                                        FIELD(hadamard_block),
                                        FIELD(hadamard_scale),
                                        FIELD(hadamard_signs),
                                        FIELD(reverse),
                                        FIELD(reserved)});
}

StructLayout quantize_matrix_params() {
    using T = QuantizeMatrixParams;
    return layout<T>("QuantizeMatrixParams",
                     {FIELD(x), FIELD(other), FIELD(sum), FIELD(norm_weight), FIELD(out), FIELD(scale),
                      FIELD(x_stride), FIELD(other_stride), FIELD(sum_stride), FIELD(out_stride),
                      FIELD(scale_stride), FIELD(rows), FIELD(columns), FIELD(by_row), FIELD(row_threads),
                      FIELD(norm_is_fp32), FIELD(norm_eps), FIELD(vector_access), FIELD(reserved)});
}

StructLayout scale_ref() {
    using T = ScaleRef;
    return layout<T>("ScaleRef", {FIELD(ptr), FIELD(row_stride), FIELD(block_stride)});
}

StructLayout gemm_params() {
    using T = GemmParams;
    return layout<T>("GemmParams", {FIELD(tma_a),
                                    FIELD(tma_b),
                                    FIELD(a),
                                    FIELD(b),
                                    FIELD(out),
                                    FIELD(bias),
                                    FIELD(a_stride),
                                    FIELD(b_stride),
                                    FIELD(out_stride),
                                    FIELD(scale_a),
                                    FIELD(scale_b),
                                    FIELD(scale_result),
                                    FIELD(m),
                                    FIELD(n),
                                    FIELD(k),
                                    FIELD(out_type),
                                    FIELD(bias_type),
                                    FIELD(scale_a_row_shift),
                                    FIELD(m_blocks),
                                    FIELD(n_blocks),
                                    FIELD(band),
                                    FIELD(vector_stores),
                                    FIELD(group_rows),
                                    FIELD(b_group_stride),
                                    FIELD(scale_a_group_stride),
                                    FIELD(scale_b_group_stride),
                                    FIELD(groups),
                                    FIELD(rows_per_group),
                                    FIELD(splits),
                                    FIELD(reserved)});
}

StructLayout qkv_params() {
    using T = QkvParams;
    return layout<T>("QkvParams",
                     {FIELD(gemm),        FIELD(q),         FIELD(k),         FIELD(v),
                      FIELD(q_descale),   FIELD(k_descale), FIELD(v_descale), FIELD(q_norm),
                      FIELD(k_norm),      FIELD(rope_cos),  FIELD(rope_sin),  FIELD(rope_offsets),
                      FIELD(cu_seqlens),  FIELD(seqused),   FIELD(batch),     FIELD(seqlen),
                      FIELD(heads_q),     FIELD(heads_kv),  FIELD(rope_rows), FIELD(rotary_dim),
                      FIELD(interleaved), FIELD(norm_eps),  FIELD(reserved)});
}

StructLayout tma_box() {
    using T = TmaBox;
    return layout<T>("TmaBox", {FIELD(rank), FIELD(box), FIELD(element_type), FIELD(swizzle)});
}

StructLayout kernel_info() {
    using T = KernelInfo;
    return layout<T>("KernelInfo", {FIELD(abi_version),
                                    FIELD(info_bytes),
                                    FIELD(params_bytes),
                                    FIELD(kind),
                                    FIELD(entry),
                                    FIELD(kBlockM),
                                    FIELD(kBlockN),
                                    FIELD(kHeadDim),
                                    FIELD(kHeadDimV),
                                    FIELD(kStages),
                                    FIELD(threads),
                                    FIELD(min_ctas_per_sm),
                                    FIELD(cluster),
                                    FIELD(shared_bytes),
                                    FIELD(producer_registers),
                                    FIELD(consumer_registers),
                                    FIELD(pack_gqa),
                                    FIELD(scale_block),
                                    FIELD(v_colmajor),
                                    FIELD(paged),
                                    FIELD(qv),
                                    FIELD(appends),
                                    FIELD(out_e4m3),
                                    FIELD(max_splits),
                                    FIELD(tma)});
}

#undef FIELD

}  // namespace

std::vector<StructLayout> struct_layouts() {
    return {tensor_map(),      tensor_ref(),
            descale_ref(),     row_ref(),
            channel_ref(),     sequence_params(),
            page_params(),     score_params(),
            dropout_params(),  scheduler_params(),
            out_scale_ref(),   forward_params(),
            backward_params(), decode_params(),
            group_ref(),       quantize_params(),
            appended_rows(),   rotary_params(),
            place_params(),    append_params(),
            scale_ref(),       gemm_params(),
            tma_box(),         kernel_info(),
            schedule_params(), quantize_matrix_params(),
            qkv_params()};
}

}  // namespace flash8
