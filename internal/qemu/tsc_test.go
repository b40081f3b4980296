package qemu

import "testing"

func TestTSCRate(t *testing.T) {
	a := tscKHz()
	if a == 0 {
		t.Skip("missing capability: a time stamp counter of constant rate")
	}
	// Two measurements agree far better than the 500 ppm at which a guest's
	// clock would be of no use; no processor is outside these bounds.
	b := tscKHz()
	if d := a - b; d > a/5000 || d < -a/5000 {
		t.Errorf("measured %d and %d kHz", a, b)
	}
	if a < 100_000 || a > 10_000_000 {
		t.Errorf("%d kHz", a)
	}
	t.Log(a, b)
}
