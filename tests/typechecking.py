"""The checker that jaxtyping's hook puts round every function of the package while tests run."""

from beartype import BeartypeConf, beartype

# Where a float is asked for, a whole number will do, as Python's typing has it and beartype by default has not.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
