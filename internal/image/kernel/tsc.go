package kernel

import (
	"os"
	"slices"
	"strings"
	"time"
)

// rdtsc reads the processor's time stamp counter.
func rdtsc() uint64

const (
	// tscSpan is how long the counter is watched. Reading both clocks is good
	// to about 50 ns, so this is good to 2 ppm: 0.2 s a day in a guest that
	// keeps time by it.
	tscSpan = 50 * time.Millisecond
	// tscReads brackets each end; the tightest counts.
	tscReads = 16
)

// hostTSCKHz measures the host's TSC frequency in kHz, which is also a guest's:
// TCG hands the host's counter through, KVM does unless told otherwise. It is 0
// where the counter does not run at a constant rate.
func hostTSCKHz() int {
	if !constantTSC(cpuFlags()) {
		return 0
	}
	t0, c0 := readClocks()
	time.Sleep(tscSpan)
	t1, c1 := readClocks()
	ns := t1.Sub(t0).Nanoseconds()
	if ns <= 0 || c1 <= c0 {
		return 0
	}
	return int((float64(c1-c0)*1e6 + float64(ns)/2) / float64(ns))
}

// readClocks reads the system's clock and the counter at the same instant, as
// nearly as can be: of several reads, the one with the least between them.
func readClocks() (time.Time, uint64) {
	var at time.Time
	var count uint64
	least := ^uint64(0)
	for range tscReads {
		a := rdtsc()
		t := time.Now()
		b := rdtsc()
		if b-a < least {
			least, at, count = b-a, t, a+(b-a)/2
		}
	}
	return at, count
}

func cpuFlags() []string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "flags" {
			return strings.Fields(value)
		}
	}
	return nil
}

func constantTSC(flags []string) bool { return slices.Contains(flags, "constant_tsc") }
