package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/agentiso/agentiso/internal/fault"
)

// multiples of a byte by their letter: powers of 1024, as everybody means.
var multiples = map[byte]int64{'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30, 'T': 1 << 40}

// sizeFlag is a size on the command line: 512M, 2G, 1.5GiB; a bare number is
// in units of unit.
type sizeFlag struct {
	bytes int64
	unit  int64
}

func (f *sizeFlag) Set(s string) error {
	n, err := parseSize(s, f.unit)
	if err != nil {
		return err
	}
	f.bytes = n
	return nil
}

func (f *sizeFlag) String() string {
	if f.bytes == 0 {
		return ""
	}
	return formatBytes(f.bytes)
}

// Type names the value in usage lines.
func (f *sizeFlag) Type() string { return "size" }

func parseSize(s string, unit int64) (int64, error) {
	bad := func() (int64, error) {
		return 0, fault.New(fault.Invalid, "%q is not a size", s).WithNext("Give a number with K, M, G or T, such as 512M or 2G.")
	}
	t := strings.ToUpper(strings.TrimSpace(s))
	number := strings.TrimRight(t, "KMGTIB")
	suffix := t[len(number):]
	switch {
	case suffix == "":
	case suffix == "B":
		unit = 1
	case multiples[suffix[0]] > 0 && (suffix[1:] == "" || suffix[1:] == "B" || suffix[1:] == "IB"):
		unit = multiples[suffix[0]]
	default:
		return bad()
	}
	if n, err := strconv.ParseInt(number, 10, 64); err == nil {
		if n <= 0 || n > math.MaxInt64/unit {
			return bad()
		}
		return n * unit, nil
	}
	x, err := strconv.ParseFloat(number, 64)
	if err != nil || strings.ContainsAny(number, "EXNP+-_") || x <= 0 || x*float64(unit) >= math.MaxInt64 || x*float64(unit) < 1 {
		return bad()
	}
	return int64(x * float64(unit)), nil
}

// formatBytes says a size in three digits or so.
func formatBytes(n int64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	x, i := float64(n), -1
	for x >= 1023.5 && i < 4 {
		x /= 1024
		i++
	}
	unit := "KMGTP"[i : i+1]
	if x < 9.95 {
		return strings.TrimSuffix(fmt.Sprintf("%.1f", x), ".0") + " " + unit + "iB"
	}
	return fmt.Sprintf("%.0f %siB", x, unit)
}

// formatDuration says a duration in the precision that is of use.
func formatDuration(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return fmt.Sprintf("%d µs", d.Microseconds())
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.2f s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

// formatAge says how long ago t was.
func formatAge(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	d := time.Since(t)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s ago", max(int(d.Seconds()), 0))
	case d < time.Hour:
		return fmt.Sprintf("%d min ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d.Hours()))
	}
	return fmt.Sprintf("%d days ago", int(d.Hours()/24))
}
