"""Stand-ins for the FP8 recipes, which nothing here computes with."""


class Recipe:
    def __init__(self, **settings) -> None:
        vars(self).update(settings)


class DelayedScaling(Recipe): ...


class Float8CurrentScaling(Recipe): ...


class Float8BlockScaling(Recipe): ...


class MXFP8BlockScaling(Recipe): ...
