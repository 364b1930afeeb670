"""The stale schedule of docs/asyncdiff.md in one process, written down again without the backend:
the exact answer for N ranks.

Every unit's result of the last turn is kept in a dictionary. To make one segment's part, the whole
denoiser runs, and all units outside the segment return what is in the dictionary.
"""

import functools
import itertools


class Simulation:
    """In place of a denoiser's forward, while entered.

    timesteps: what the pipeline gives the denoiser in an undisturbed run, evaluation by evaluation.
    """

    def __init__(
        self,
        denoiser,
        *,
        unit_names,
        bounds,
        stride,
        time_shift,
        num_synchronous,
        timesteps,
        extrapolate=False,
    ):
        self.denoiser = denoiser
        self.modules = {name: denoiser.get_submodule(name) for name in unit_names}
        self.segments = [list(unit_names[a:b]) for a, b in itertools.pairwise(bounds)]
        self.stride, self.shift, self.num_synchronous = stride, int(time_shift), num_synchronous
        self.timesteps, self.extrapolate = timesteps, extrapolate
        self.evaluation, self.turns, self.running, self.made, self.ahead = 0, [], None, {}, None

    def __enter__(self):
        self.found = {
            module: module.__dict__.get("forward")
            for module in [self.denoiser, *self.modules.values()]
        }
        for name, module in self.modules.items():
            module.forward = functools.partial(self.unit, name, module.forward)
        self.original = self.denoiser.forward
        self.denoiser.forward = self.forward
        return self

    def __exit__(self, *_):
        for module, forward in self.found.items():
            del module.forward
            if forward is not None:
                module.forward = forward

    def unit(self, name, forward, *args, **kwargs):
        if self.running is not None and name not in self.running:
            return self.stale(name)
        self.made[name] = forward(*args, **kwargs)
        return self.made[name]

    def stale(self, name):
        (_, older), (_, last) = self.turns[-2:] if len(self.turns) > 1 else self.turns * 2
        if not self.extrapolate or len(self.turns) < 2:
            return last[name]
        older_at, last_at = self.turns[-2][0], self.turns[-1][0]
        reach = (self.evaluation - last_at) / (last_at - older_at)

        def line(old, new):
            return None if new is None else new + reach * (new - old)

        if isinstance(last[name], tuple):
            return tuple(line(old, new) for old, new in zip(older[name], last[name], strict=True))
        return line(older[name], last[name])

    def run(self, segment, timestep, arguments):
        """The denoiser with only this segment's units running -> its result, and what those units
        returned.
        """
        self.running, self.made = segment, {}
        with_timestep = ((*arguments[0][:1], timestep, *arguments[0][2:]), arguments[1])
        if "timestep" in arguments[1]:
            with_timestep = (arguments[0], {**arguments[1], "timestep": timestep})
        output = self.original(*with_timestep[0], **with_timestep[1])
        self.running = None
        return output, self.made

    def forward(self, *args, **kwargs):
        evaluation, arguments = self.evaluation, (args, kwargs)
        output = self.evaluate(evaluation, arguments)
        self.evaluation += 1
        return output

    def evaluate(self, evaluation, arguments):
        if evaluation < self.num_synchronous:
            self.made = {}
            output = self.original(*arguments[0], **arguments[1])
            self.turns.append((evaluation, self.made))
            return output
        if (evaluation - self.num_synchronous) % self.stride == 1:
            return self.ahead
        # each segment works for the evaluation `target`; with stride 2 the last one also works for
        # this one, on one more rank
        target = min(evaluation + self.stride - 1, len(self.timesteps) - 1)
        if self.stride == 2 and self.shift:
            target = evaluation + 1
        made = {}
        for segment in self.segments:
            output, new = self.run(segment, self.timesteps[target - self.shift], arguments)
            made |= new
        if self.stride == 2:
            self.ahead = output
            output, _ = self.run(
                self.segments[-1], self.timesteps[evaluation - self.shift], arguments
            )
        self.turns.append((evaluation, made))
        return output
