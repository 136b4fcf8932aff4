"""What a training step will need and take on a cluster, for every sensible choice of parallel sizes.

Plain Python on lengths and sizes; nothing is run. `search.search` is the way in, `megatron-prefix plan` its command
line.

    model           the shape of a model, experts included; four public ones by name
    lengths         how long prompts and responses are
    loads           which micro-batches the data-parallel rank with the most work gets, repeated and grouped
    memory          bytes on the fullest GPU
    communication   bytes and seconds of every kind of communication
    step_time       seconds of a step, part by part
    search          all choices, those that fit, the quickest
"""
