from psm_kernels.backends.base import Backend


class Cuda(Backend):
    name, what, devices = "cuda", "interim", ("cuda",)

    def unavailable(self):
        return "no CUDA device was found"
