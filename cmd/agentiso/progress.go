package main

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/agentiso/agentiso/client"
)

const (
	// showAfter keeps what is quick from flickering.
	showAfter = 300 * time.Millisecond
	frameTime = 100 * time.Millisecond
	barWidth  = 24
)

// progress shows on one line of the terminal how far something has come. It
// is silent when stderr is no terminal, and with --json. Its goroutine ends
// with stop.
type progress struct {
	out   *os.File
	began time.Time

	mu    sync.Mutex
	label string
	now   client.Progress
	shown bool

	quit chan struct{}
	done sync.WaitGroup
	once sync.Once
}

// progress begins to show label with a spinner and the time.
func (a *app) progress(label string) *progress {
	p := &progress{out: a.stderr, began: time.Now(), label: label, quit: make(chan struct{})}
	if a.json || !isTerminal(a.stderr) {
		return p
	}
	p.done.Go(p.run)
	return p
}

// report takes what the daemon says of its progress.
func (p *progress) report(now client.Progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now.Log != "" && now.Stage == "" {
		now.Stage = p.now.Stage
	}
	p.now = now
}

// bytes takes how much of something has passed.
func (p *progress) bytes(done, total int64) {
	p.report(client.Progress{Done: done, Total: total, Unit: "bytes"})
}

// stop takes the line away. It may be called twice.
func (p *progress) stop() {
	p.once.Do(func() {
		close(p.quit)
		p.done.Wait()
		if p.shown {
			fmt.Fprint(p.out, "\r\x1b[K")
		}
	})
}

func (p *progress) run() {
	tick := time.NewTicker(frameTime)
	defer tick.Stop()
	for frame := 0; ; frame++ {
		select {
		case <-p.quit:
			return
		case <-tick.C:
		}
		if time.Since(p.began) < showAfter {
			continue
		}
		width, _, err := term.GetSize(int(p.out.Fd()))
		if err != nil || width < 20 {
			width = 80
		}
		p.mu.Lock()
		line := p.line(frame, width-1)
		p.shown = true
		p.mu.Unlock()
		fmt.Fprint(p.out, "\r\x1b[K"+line)
	}
}

// line draws one frame, at most width characters wide.
func (p *progress) line(frame, width int) string {
	elapsed := time.Since(p.began).Truncate(frameTime)
	var b strings.Builder
	fmt.Fprintf(&b, "%c %s", `|/-\`[frame%4], p.label)
	if p.now.Stage != "" {
		fmt.Fprintf(&b, ": %s", clean(p.now.Stage))
	}
	n := p.now
	switch {
	case n.Total > 0:
		done := min(max(n.Done, 0), n.Total)
		full := int(float64(done) / float64(n.Total) * barWidth)
		fmt.Fprintf(&b, " [%s%s] %3.0f%%", strings.Repeat("=", full), strings.Repeat(" ", barWidth-full), float64(done)/float64(n.Total)*100)
		if n.Unit == "bytes" {
			fmt.Fprintf(&b, " %s of %s", formatBytes(done), formatBytes(n.Total))
		}
	case n.Unit == "bytes" && n.Done > 0:
		fmt.Fprintf(&b, " %s", formatBytes(n.Done))
	}
	if s := elapsed.Seconds(); n.Unit == "bytes" && n.Done > 0 && s >= 1 {
		fmt.Fprintf(&b, " %s/s", formatBytes(int64(float64(n.Done)/s)))
	}
	fmt.Fprintf(&b, "  %.1f s", elapsed.Seconds())
	if n.Log != "" {
		fmt.Fprintf(&b, "  %s", strings.ReplaceAll(clean(n.Log), "\n", " "))
	}
	if r := []rune(b.String()); len(r) > width {
		return string(r[:width])
	}
	return b.String()
}
