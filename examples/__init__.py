"""The examples: demo drivers, and the text and model that they fetch.

A regular package, so that `import examples` never finds an installed package of the same name.
"""
