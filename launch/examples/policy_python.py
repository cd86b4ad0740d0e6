# python -m tolaria.tamiyo.server --policy policy_python:FirstFree --bind ENDPOINT --key-file FILE    (in this folder)
from tolaria.tamiyo import policy as do
from tolaria.tamiyo.sight import Sight


class FirstFree(do.Policy):
    """Grows one seed at a time, where its gradient is largest, and takes it on whenever its gate would open."""

    version = "first-free-1"

    def decide(self, state, reports):
        sees = Sight(state)
        if sees.conservative:
            return []
        if sees.growing:
            return [slot.advance(reason="its gate is open") for slot in sees.growing[:64] if slot.ready]
        offers = [(c.signal or 0, slot.name, c.blueprint) for slot in sees.free for c in slot.candidates]
        return [do.germinate(slot, blueprint, reason=f"gradient {g:.3g}") for g, slot, blueprint in sorted(offers)[-1:]]
