/** @file rms_norm_bf16.cu @brief RMSNorm in bf16. */

#include "rms_norm.cuh"

CHATFLOW_DEFINE_RMS_NORM(bf16, chatflow::Bf16)
