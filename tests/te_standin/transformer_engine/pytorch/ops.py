"""Stand-ins for the operation-based API, from which megatron-core derives classes."""


class FusibleOperation: ...


class Sequential: ...
