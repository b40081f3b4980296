package measure

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestResults(t *testing.T) {
	s := New("boot")
	for i := 1; i <= 100; i++ {
		s.AddDuration("fast", "ready_ms", time.Duration(i)*time.Millisecond)
	}
	s.Add("slow", "ready_ms", "ms", 505)
	s.Add("slow", "other", "count", 3)
	want := []Result{
		{Bench: "boot", Case: "fast", Metric: "ready_ms", Unit: "ms", N: 100, Min: 1, P50: 50.5, P90: 90, P99: 99, Max: 100, RatioTo: "slow", Ratio: 0.1},
		{Bench: "boot", Case: "slow", Metric: "ready_ms", Unit: "ms", N: 1, Min: 505, P50: 505, P90: 505, P99: 505, Max: 505, RatioTo: "slow", Ratio: 1},
		{Bench: "boot", Case: "slow", Metric: "other", Unit: "count", N: 1, Min: 3, P50: 3, P90: 3, P99: 3, Max: 3, RatioTo: "slow", Ratio: 1},
	}
	if diff := cmp.Diff(want, s.Results("slow")); diff != "" {
		t.Errorf("results (-want +got):\n%s", diff)
	}
	for _, r := range s.Results("") {
		if r.RatioTo != "" || r.Ratio != 0 {
			t.Errorf("%s has a ratio without a contrast", r.Case)
		}
	}
}

func TestPrint(t *testing.T) {
	s := New("link")
	s.Add("raw", "throughput", "MB/s", 92.123456)
	var j, table strings.Builder
	if err := Print(&j, s.Results("raw"), true); err != nil {
		t.Fatal(err)
	}
	want := `{"bench":"link","case":"raw","metric":"throughput","unit":"MB/s","n":1,"min":92.12,"p50":92.12,"p90":92.12,"p99":92.12,"max":92.12,"ratio_to":"raw","ratio":1}` + "\n"
	if j.String() != want {
		t.Errorf("JSON is %s, want %s", j.String(), want)
	}
	if err := Print(&table, s.Results("raw"), false); err != nil {
		t.Fatal(err)
	}
	if lines := strings.Count(table.String(), "\n"); lines != 2 || !strings.Contains(table.String(), "1× raw") {
		t.Errorf("table is\n%s", table.String())
	}
}
