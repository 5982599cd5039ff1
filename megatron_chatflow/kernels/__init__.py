"""Operations of the model with their references, CPU and CUDA kernels, and attention back ends."""
