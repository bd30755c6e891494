"""The laws that are known by name.

A file for each kind: `size` (Kaplan, Chinchilla), `precision` (how bit widths enter, after Kumar),
`rounding` (what few bits add, after Ouyang and Chen), `formats` (Sun, Panferov), `free` (a number
for every width, Quartet).
"""

from qat.laws.forms.formats import capacity, sun
from qat.laws.forms.free import named
from qat.laws.forms.precision import FAMILY
from qat.laws.forms.rounding import chen, ouyang
from qat.laws.forms.size import chinchilla, kaplan
from qat.laws.law import Law
from qat.laws.table import unknown_name

_OTHERS = (kaplan, chinchilla, ouyang, chen, sun, capacity)
LAWS = {law.name: law for law in (*_OTHERS, *(member.law() for member in FAMILY))}


def get_law(law: str | Law) -> Law:
    """Looks a law up by name; a `Law` is returned as it is.

    Raises:
        ValueError: for an unknown name; the message gives the nearest known one.
    """
    if isinstance(law, Law):
        return law
    if law in LAWS:
        return LAWS[law]
    if spelled := named(law):
        return spelled
    raise unknown_name("law", law, LAWS)
