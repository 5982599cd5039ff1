/** @file rms_norm_fp32.cu @brief RMSNorm in fp32. */

#include "rms_norm.cuh"

CHATFLOW_DEFINE_RMS_NORM(fp32, float)
