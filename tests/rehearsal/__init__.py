"""A rehearsal of CUDA and NCCL without a GPU: the real program on CPU tensors that say they are on
cuda:i.

Real numbers are computed, and what CUDA or NCCL would refuse is refused: operators on tensors of
two devices, tensors on another rank's device, a CPU tensor in an NCCL group, a host that waits for
a kernel whose peer is lost. It also records where the host waits for the device, and which rank
asked which group for what, so that order.py can find deadlocks.

It says nothing about speed, memory limits, kernels or real streams.

    rehearsal.py   Rehearsal: installs everything below into this process
    tensors.py     CudaTensor, the tensor with a label
    placement.py   on which device an operator runs, and what it waits for
    gpus.py        what torch.cuda says about the rehearsed GPUs
    groups.py      NCCL groups: gloo groups with NCCL's rules
    journal.py     what is recorded
    order.py       the journals of all ranks -> operations that do not match, and circles of waiting
    cases.py       what is rehearsed on several GPUs: method_cases.py, option_cases.py (each a case
                   as in case.py); one_rank_cases.py: on one
    runs.py        how; jobs.py: what comes after a case's first job
    host/          puts GPUs into the processes of a whole host
"""
