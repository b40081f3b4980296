package qemu

import (
	"math"
	"os"
	"regexp"
	"time"

	"golang.org/x/sys/unix"
)

// rdtsc reads the processor's time stamp counter.
func rdtsc() uint64

// tscWindow is how long the counter is watched: an error of 50 ns at each end
// is 3 millionths of it.
const tscWindow = 30 * time.Millisecond

// steadyTSC matches the flags of a counter whose rate never changes.
var steadyTSC = regexp.MustCompile(`(?m)^flags\s*:.*\bconstant_tsc\b.*\bnonstop_tsc\b`)

// tscKHz measures the rate of the host's time stamp counter, which is the one
// that a guest under TCG reads; 0 if it has no constant rate. It is measured
// because every other source fails somewhere: the CPUID leaves are absent on
// AMD and under many hypervisors, "cpu MHz" in /proc/cpuinfo is the present
// clock of a core, and the kernel's log is closed to ordinary users.
func tscKHz() int64 {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || !steadyTSC.Match(info) {
		return 0
	}
	c0, t0, ok0 := tscSample()
	time.Sleep(tscWindow)
	c1, t1, ok1 := tscSample()
	if !ok0 || !ok1 || t1 <= t0 || c1 <= c0 {
		return 0
	}
	return int64(math.Round(float64(c1-c0) / float64(t1-t0) * 1e6))
}

// tscSample reads the counter and the clock (nanoseconds) at one moment: of
// several tries the one with the least time between two looks at the counter
// is the one that nothing interrupted.
func tscSample() (count uint64, ns int64, ok bool) {
	best := ^uint64(0)
	for range 50 {
		var ts unix.Timespec
		before := rdtsc()
		if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &ts); err != nil {
			return 0, 0, false
		}
		after := rdtsc()
		if d := after - before; d < best {
			best, count, ns = d, before+d/2, ts.Nano()
		}
	}
	return count, ns, true
}
