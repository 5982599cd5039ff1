/** @file cross_entropy_bf16.cu @brief Cross-entropy in bf16. */

#include "cross_entropy.cuh"

CHATFLOW_DEFINE_CROSS_ENTROPY(bf16, chatflow::Bf16)
