/** @file cross_entropy_fp32.cu @brief Cross-entropy in fp32. */

#include "cross_entropy.cuh"

CHATFLOW_DEFINE_CROSS_ENTROPY(fp32, float)
