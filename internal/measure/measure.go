// Package measure turns samples into the one form in which every benchmark of
// agentiso prints its results, so that figures of different benchmarks, runs
// and versions can be laid side by side.
//
// It times nothing itself and judges nothing: machines are noisy, so a result
// carries the ratio to a contrast measured in the same run.
package measure

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"
	"time"
)

// Result is one metric of one case. It is printed as one JSON object a line;
// the field names are stable.
type Result struct {
	Bench  string  `json:"bench"`
	Case   string  `json:"case"`
	Metric string  `json:"metric"`
	Unit   string  `json:"unit"`
	N      int     `json:"n"`
	Min    float64 `json:"min"`
	P50    float64 `json:"p50"`
	P90    float64 `json:"p90"`
	P99    float64 `json:"p99"`
	Max    float64 `json:"max"`
	// RatioTo names the case that Ratio compares with; "" and 0 without one.
	RatioTo string `json:"ratio_to"`
	// Ratio is this case's p50 over that of RatioTo, same metric.
	Ratio float64 `json:"ratio"`
}

// Samples collects values by case and metric in the order of first use. The
// zero value is not ready; see [New]. It is used by one goroutine.
type Samples struct {
	bench string
	keys  []key
	units map[key]string
	all   map[key][]float64
}

type key struct{ name, metric string }

// New returns an empty collection for the benchmark named.
func New(bench string) *Samples {
	return &Samples{bench: bench, units: map[key]string{}, all: map[key][]float64{}}
}

// Add records one value.
func (s *Samples) Add(name, metric, unit string, v float64) {
	k := key{name, metric}
	if _, ok := s.all[k]; !ok {
		s.keys = append(s.keys, k)
		s.units[k] = unit
	}
	s.all[k] = append(s.all[k], v)
}

// AddDuration records d in milliseconds.
func (s *Samples) AddDuration(name, metric string, d time.Duration) {
	s.Add(name, metric, "ms", float64(d)/float64(time.Millisecond))
}

// Results summarises every case, each metric's ratio taken to case contrast
// where that has the same metric. An empty contrast means no ratios.
func (s *Samples) Results(contrast string) []Result {
	var rs []Result
	for _, k := range s.keys {
		r := summarise(s.all[k])
		r.Bench, r.Case, r.Metric, r.Unit = s.bench, k.name, k.metric, s.units[k]
		if base := s.all[key{contrast, k.metric}]; len(base) > 0 {
			if p := summarise(base).P50; p != 0 {
				r.RatioTo, r.Ratio = contrast, round(r.P50/p)
			}
		}
		rs = append(rs, r)
	}
	return rs
}

func summarise(v []float64) Result {
	v = slices.Sorted(slices.Values(v))
	return Result{
		N: len(v), Min: round(v[0]), P50: round(percentile(v, 50)), P90: round(percentile(v, 90)),
		P99: round(percentile(v, 99)), Max: round(v[len(v)-1]),
	}
}

// percentile is by the nearest-rank method on sorted v: a value that was
// really measured, for p50 of an even count the mean of the middle two.
func percentile(v []float64, p int) float64 {
	if n := len(v); p == 50 && n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	rank := int(math.Ceil(float64(p) / 100 * float64(len(v))))
	return v[max(rank, 1)-1]
}

// round keeps four significant digits: more would claim a precision that no
// run has.
func round(x float64) float64 {
	if x == 0 || math.IsInf(x, 0) || math.IsNaN(x) {
		return x
	}
	scale := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(x))))
	return math.Round(x*scale) / scale
}

// Print writes rs as JSON lines or as a table.
func Print(w io.Writer, rs []Result, asJSON bool) error {
	if asJSON {
		enc := json.NewEncoder(w)
		for _, r := range rs {
			if err := enc.Encode(r); err != nil {
				return err
			}
		}
		return nil
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "bench\tcase\tmetric\tn\tmin\tp50\tp90\tp99\tmax\tunit\tratio\t")
	for _, r := range rs {
		ratio := ""
		if r.RatioTo != "" {
			ratio = fmt.Sprintf("%.3g× %s", r.Ratio, r.RatioTo)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%g\t%g\t%g\t%g\t%g\t%s\t%s\t\n",
			r.Bench, r.Case, r.Metric, r.N, r.Min, r.P50, r.P90, r.P99, r.Max, r.Unit, ratio)
	}
	return tw.Flush()
}
