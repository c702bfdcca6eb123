from psm_kernels.backends.base import Backend


class Triton(Backend):
    name, what, devices = "triton", "interim", ("cuda",)

    def unavailable(self):
        return "no GPU was found, and TRITON_INTERPRET=1 is not set"
