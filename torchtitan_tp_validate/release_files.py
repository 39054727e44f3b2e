"""The files that tell a tested torchtitan release; written by scripts/make_releases.py."""

BLOBS: dict[str, dict[str, tuple[str, str]]] = {
    "0.2.0": {
        "torchtitan/distributed/tensor_parallel.py": (
            "a2749f4c11cd0765c9591137c81ff25bcff0c1a1",
            "59f49d16346d94befaee74882b4843859a64c850",
        ),
        "torchtitan/experiments/simple_fsdp/deepseek_v3/parallelize.py": (
            "9ffbc8f76dd30d143087e311b979294b4ba3908f",
            "7c92f4138c62c8e2a014298fceff189780a41e2c",
        ),
        "torchtitan/experiments/simple_fsdp/llama3/parallelize.py": (
            "fdc40031f593a0bdf5ecc0f97c6b37c082bf0b95",
            "5532262e409e988e589e606dd885c638b01ee850",
        ),
        "torchtitan/models/deepseek_v3/infra/parallelize.py": (
            "8d13a3f31f44b235367da8d9fa88f298700bdcb8",
            "8a5b4a729544e485efc8fa254e01fcc79fca5e38",
        ),
        "torchtitan/models/llama3/infra/parallelize.py": (
            "4944af569e3bcd0db38e9ca2d5e47b35884fbe9f",
            "a64b1d19123af7d46743d5601cff0dc0bb3dece1",
        ),
        "torchtitan/models/llama4/infra/parallelize.py": (
            "1f579ccd046dfda82c8eb8bd06cba701ed710c21",
            "b5f6b6fd09c021b19d7d53bf92cfe68c96709601",
        ),
        "torchtitan/models/qwen3/infra/parallelize.py": (
            "5fa8549e9f32d924efeb632e8a59361ef89dd6df",
            "d699fd1e86b2edc7b24c9ccbc33209856f861585",
        ),
    },
    "0.2.1": {
        "torchtitan/distributed/tensor_parallel.py": (
            "59fffc86a2bb13ccf3797c7466af1e2a497b3fd0",
            "a7e984e80c471d5d430ab0090ae769d67bbe04a8",
        ),
        "torchtitan/experiments/compiler_toolkit/deepseek_v3/parallelize.py": (
            "011bbe402a13674e1b9e8c14df236e990b5031c4",
            "51f29dec8b20d95e0b8bb2911a913c75ec0345b7",
        ),
        "torchtitan/experiments/compiler_toolkit/llama3/parallelize.py": (
            "68fa7443f4cc2a93649c44a64e81d31eb4709231",
            "2774052e755247e8d1eeb999be5ec04fdf589870",
        ),
        "torchtitan/experiments/gpt_oss/infra/parallelize.py": (
            "4768dab6597c43b76c7c07e5bc03b9ea391b515a",
            "43c73eddd993bf686e6da8580010ec9566130ca6",
        ),
        "torchtitan/experiments/rl/unified/infra/parallelize.py": (
            "8cbeeed783fe5a5754e72ed033c9644d30ce7eb2",
            "bbda6eef518e5b3d47483db750f169cf158a694d",
        ),
        "torchtitan/experiments/simple_fsdp/deepseek_v3/parallelize.py": (
            "3e2209dd6a4484a33d5b48f5508d74651ba3e7c7",
            "5d021863f0033fefdac87fe19a05c5991ba02baf",
        ),
        "torchtitan/experiments/simple_fsdp/llama3/parallelize.py": (
            "d64a8b79fcc1bc77ffec05485612aa78d374aad3",
            "c54e9b7fcf8d579e1293e58165a33bc3ece434de",
        ),
        "torchtitan/experiments/transformers_modeling_backend/infra/parallelize.py": (
            "fcdb31f27d446c7ba28dc5503f50f95d53fe1772",
            "a285a10e72c51ad504d4b0a12bd05f14456d11b9",
        ),
        "torchtitan/models/deepseek_v3/infra/parallelize.py": (
            "374df4415789c45f596c86c80acfc30196c5e56c",
            "534f4c2a2e6e6bcabeec925f2cd8cbaab2f76121",
        ),
        "torchtitan/models/llama3/infra/parallelize.py": (
            "a77a87a9211ae398ef836ee9d64acf984ab37f22",
            "c4fc25fb9aec8bcae08711146ff4bb4db6b07eea",
        ),
        "torchtitan/models/llama4/infra/parallelize.py": (
            "454679ff557f59ab2e9302d3bd0fedb00034c387",
            "cfaec3c0ae82c9722d26be044bdde392ed697805",
        ),
        "torchtitan/models/qwen3/infra/parallelize.py": (
            "4c7f43f42688f5104a2ba1e4ab99d28f7448bb38",
            "c2525dc27df7219b6410b4c2096ecc3f7ba5d0b3",
        ),
    },
    "0.2.2": {
        "torchtitan/distributed/tensor_parallel.py": (
            "60101a28624029a810fa5818ebceb199d6408bd2",
            "459b6a551d3320631cca3e473e901211b1a51d26",
        ),
        "torchtitan/experiments/compiler_toolkit/deepseek_v3/parallelize.py": (
            "3207676b7e4ea51847381e2830d704fc5f6b4582",
            "64e749ec029fe9692af46d82b5860452b5aaf03d",
        ),
        "torchtitan/experiments/compiler_toolkit/llama3/parallelize.py": (
            "510f94aa971c08ddce65e538ff69f7873f5f4342",
            "4f4ad0553ac5b13c9caf0a89b22111e2c41fd319",
        ),
        "torchtitan/experiments/rl/unified/infra/parallelize.py": (
            "8cbeeed783fe5a5754e72ed033c9644d30ce7eb2",
            "bbda6eef518e5b3d47483db750f169cf158a694d",
        ),
        "torchtitan/experiments/simple_fsdp/deepseek_v3/parallelize.py": (
            "b49ebb7edbe5faa274398ef3e76cecf2e13b7c4b",
            "5ac47297b2167faf2924c44d431f7204e7968252",
        ),
        "torchtitan/experiments/simple_fsdp/llama3/parallelize.py": (
            "d64a8b79fcc1bc77ffec05485612aa78d374aad3",
            "c54e9b7fcf8d579e1293e58165a33bc3ece434de",
        ),
        "torchtitan/experiments/transformers_modeling_backend/infra/parallelize.py": (
            "24cd6149ae78a2aca74ff1b22a29eca5327cb88a",
            "c9f332af514e9890188f932f3a48d49684b64f5e",
        ),
        "torchtitan/models/deepseek_v3/infra/parallelize.py": (
            "19d9f946d296afa90e0aac3c57e5d652b543163f",
            "873fd01a7e499320623402fbf9f9ca316580cfa9",
        ),
        "torchtitan/models/gpt_oss/infra/parallelize.py": (
            "338092fb7a1f49195e021817e3b4eb1c247154c7",
            "9f63a65f7e02c5bd71180ac593363988f9582f76",
        ),
        "torchtitan/models/llama3/infra/parallelize.py": (
            "87f4f91ca9168561ed344de1d54aaa5692e0271f",
            "56b667989b3e79bea3a47161c46195b6c1b2a434",
        ),
        "torchtitan/models/llama4/infra/parallelize.py": (
            "5e23b81ab130bdf8dfced35a40a6f36df0b97f9d",
            "e6e163ece45b57b52e1f3a11fac594356b2b1fbb",
        ),
        "torchtitan/models/qwen3/infra/parallelize.py": (
            "4837dbc68e04cc1b33a7b15d8be35a735989fc94",
            "a845bae35a279aa3229f4b7954c2337a71809705",
        ),
    },
    "0.3.0": {
        "torchtitan/distributed/tensor_parallel.py": (
            "b608da4712ffbe091cb3fd55614c30be755247e3",
            "ba55bd2e61db4d356ec4d9aba287f894b87a98b9",
        ),
        "torchtitan/experiments/graph_trainer/deepseek_v3/parallelize.py": (
            "7d1101ebbec7f7d9fca5160bd2e21d51dd731511",
            "5c7fadcf56c0dbdc38ac64c38fc6e4eb790a5bd8",
        ),
        "torchtitan/experiments/graph_trainer/llama3/parallelize.py": (
            "a9bcd833053a73b911a7aca86de3bd521e2eb849",
            "79284e1b4c2a67e72a6d697f17438c33eab4079e",
        ),
        "torchtitan/experiments/graph_trainer/muse_glimmer/parallelize.py": (
            "414690644b0856a2162be3b1ea5a150b372c8d87",
            "79fff39f0a1600a4085913b377c57a2c0d76a8c9",
        ),
        "torchtitan/experiments/graph_trainer/qwen3/parallelize.py": (
            "1dac5e362b7fb2766863fec71d5ed35293318ed1",
            "81b5634494ae2b31b9b0576721ea498785ceba81",
        ),
        "torchtitan/experiments/transformers_modeling_backend/parallelize.py": (
            "f9ed1438e2144a7c70117ba565a1dee9dc81ffbb",
            "9aa0f6c4f71a39eab67d55a44d5c3c8b4b184c13",
        ),
        "torchtitan/models/common/decoder.py": (
            "24c53e43ba47249c24580d2a0a3f70a4b9b910f1",
            "0ecaf8f3964099498f1f90e7f5f9a9aca4997708",
        ),
        "torchtitan/models/deepseek_v3/parallelize.py": (
            "0f12437ec66c1ca70de3615f6dfb4e5b56573a7c",
            "3bca55af1d6c104afd4b3bc70d0ba6d3b133ca2c",
        ),
        "torchtitan/models/gpt_oss/parallelize.py": (
            "e2f5ce8e6fb75084b99179b0b80ef2fe67690f6b",
            "31ad7970243b6bc999686a223ac88d8b9f4edc23",
        ),
        "torchtitan/models/kimi_k2_7/parallelize.py": (
            "ab82749e2f361202c0e3bbe300b8e32e4908e138",
            "368f155c93fd06ff6110edd01f619ddd6d59d505",
        ),
        "torchtitan/models/llama3/parallelize.py": (
            "8f202b107056ddbcecda676e5884fa6ce7141bcf",
            "c621bb8860702b8a8c04ff968bf187c8e4845d2c",
        ),
        "torchtitan/models/muse_glimmer/parallelize.py": (
            "e6d3bf550ac4b3d7b6e82696552d4bd6ece04b3f",
            "8cc71f15351d0a9f9cae5710e6a3d35e9d1e0c86",
        ),
        "torchtitan/models/qwen3/parallelize.py": (
            "e01b137d098bc525bac9c0b070bb1b50b4cbc018",
            "ab28fb77833e7361bd4277595b5f57db3511ddea",
        ),
        "torchtitan/models/qwen3_5/model.py": (
            "3a34a013777eed4b368eb26537414c2faddd87c9",
            "d3b1d48efd81c0a432cf0ec57421b98bc1ed457d",
        ),
        "torchtitan/models/qwen3_5/parallelize.py": (
            "0e5ca96b76604f661957f19b6a97bf9619fad63c",
            "827f54c7095a3da4564c232f15b93e42ab3f7378",
        ),
    },
}
"""Release -> file -> its git blob as released, and with this project's patch."""
