"""What Keras' trainer leaves to do, on the backends where it does."""

from gemma_keras.backend.library import NAME, jax


def build_optimizer(model):
    """Makes the optimizer's variables before a step is traced.

    Where tracing makes variables, TensorFlow traces everything once more.
    """
    optimizer = model.optimizer
    if NAME == "tensorflow" and optimizer is not None and not optimizer.built:
        with model.distribute_strategy.scope():
            optimizer.build(model.trainable_variables)


def compiled_step(step, fixed, shardings, keep):
    """A step of Keras' trainer on JAX, compiled, that passes by what it never changes.

    Keras gives the program every variable and takes it back. A frozen weight whose
    memory is not JAX's own cannot be given, and would be copied, model and all.

    What is given is no more once the program has begun, so that a Ctrl-C between its
    end and the caller's next line would leave neither the old state nor the new.

    Args:
        step: takes `(state, data)`, returns `(logs, state)`; a state is a tuple of
            lists of arrays.
        fixed: for each of these, the positions whose arrays stay as they are.
        shardings: of a state, or None.
        keep: is called with each new state, Ctrl-C or not.
    """

    def part(state):
        groups = list(zip(state, fixed, strict=True))
        moving = [[v for i, v in enumerate(g) if i not in f] for g, f in groups]
        return moving, [[g[i] for i in sorted(f)] for g, f in groups]

    def join(moving, still):
        state = []
        for more, rest, places in zip(moving, still, fixed, strict=True):
            turns = {True: iter(rest), False: iter(more)}
            count = len(more) + len(rest)
            state.append([next(turns[i in places]) for i in range(count)])
        return tuple(state)

    def run(moving, still, data):
        logs, state = step(join(moving, still), data)
        return logs, part(state)[0]

    shardings = None if shardings is None else (None, part(shardings)[0])
    program = jax.jit(run, donate_argnums=0, out_shardings=shardings)

    def call(state, data):
        moving, still = part(state)
        results = []
        try:
            # The list has the result before Python looks for signals again.
            results.extend(map(program, [moving], [still], [data]))
            logs, moving = results[0]
            state = join(moving, still)
            keep(state)
            return logs, state
        except BaseException:
            if results:
                keep(join(results[0][1], still))
            raise

    return call


def assign_living(variables, values):
    """Gives variables what JAX computed, but for what a failed program took along.

    Returns:
        How many it took along; their variables are left as they are.
    """
    lost = 0
    for variable, value in zip(variables, values, strict=True):
        if isinstance(value, jax.Array) and value.is_deleted():
            lost += 1
        else:
            variable.assign(value)
    return lost


def sync_training(model):
    """Brings to the model's variables what `fit` has changed so far.

    JAX keeps the state of training outside of them until an epoch ends.
    """
    if NAME == "jax":
        model.jax_state_sync()
