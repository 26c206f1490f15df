"""What this package uses of other libraries beyond their documented interfaces, each thing once.

One file per library: `torch`, `transformers`, `accelerate`, `peft`. `cache_name` handles an argument that transformers
renamed, `hooks` joins what torch and accelerate attach to modules, and `tested_versions` warns of untested versions.
`adapter_clients` knows which targets of an adapter other programs apply, and `other_classes` recognizes DeepSeek-V2 of
other classes than this package's.
"""
