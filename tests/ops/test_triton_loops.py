"""What the inner loops of compiled kernels issue, and the share of copy speed that a model predicts of it."""

import pytest

triton_loops = pytest.importorskip("mega_scale.ops.triton_loops")

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_3:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/                   LDG.E.128 R8, [R2.64] ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   STG.E [R2.64], R4 ;
.L_x_2:
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
.L_x_4:
        /*0070*/                   FADD R4, R4, R5 ;
        /*0080*/               @P1 BRA `(.L_x_4) ;
        /*0090*/               @P2 BRA `(.L_x_2) ;
        /*00a0*/               @P3 BRA `(.L_x_3) ;
        /*00b0*/                   EXIT ;
.L_x_5:
        /*00c0*/                   BRA `(.L_x_5);
"""


def test_instructions_of_a_tile_are_those_of_its_loops():
    (tile,) = triton_loops.find_loops(SASS)
    assert tile.own == 3 and [loop.own for loop in tile.inner] == [3, 2] and tile.inner[1].inner[0].own == 2
    assert triton_loops.tile_instructions(SASS, 4) == 3 + 4 * (3 + 4)
    with pytest.raises(ValueError, match="no loop over tiles"):
        triton_loops.tile_instructions(SASS.replace("HMMA", "FFMA"), 4)


def test_the_predicted_share_is_that_of_the_longest_part():
    light = triton_loops.Average(100, 128, 50000, 8, 1, 16, 4, 1024)
    parts = light.copy_share(4)
    assert light.residents() == 2 and parts["waves"] == 1 and parts["memory"] > parts["issue"]
    heavy = light._replace(instructions=3000, registers=255)
    parts = heavy.copy_share(4)
    assert heavy.residents() == 1 and parts["waves"] == 2 and parts["chain"] > parts["issue"] > parts["memory"]
    # Two programs' instructions, on four schedulers.
    assert parts["issue"] == pytest.approx(2 * 32 * 3000 * 2 / triton_loops.H100.hertz)
    assert parts["share"] == pytest.approx(4 * 32768 * 4096 / triton_loops.H100.copied / parts["chain"])
