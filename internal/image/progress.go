package image

import (
	"bytes"
	"strconv"
	"strings"
	"sync"

	"github.com/agentiso/agentiso/internal/domain"
)

// bootstrapStages are mmdebstrap's own, by the beginning of the line with
// which it says that one begins ("I: …").
var bootstrapStages = []struct{ line, stage string }{
	{"running apt-get update", "fetching package lists"},
	{"downloading packages", "downloading packages"},
	{"extracting archives", "extracting packages"},
	{"installing essential packages", "installing essential packages"},
	{"installing remaining packages", "installing packages"},
	{"running --customize-hook", "setting up users"},
	{"cleaning package lists", "cleaning up"},
	{"creating tarball", "writing the disk"},
}

const (
	maxLogLine   = 4 << 10
	keptLogLines = 40
)

// bootstrapLog is mmdebstrap's standard error: it makes progress of it and
// keeps its end and its error lines for the fault.
type bootstrapLog struct {
	progress domain.ProgressFunc

	mu       sync.Mutex
	partial  []byte
	stage    string
	done     int64
	total    int64 // packages of the batch at hand; 0 while unknown
	lines    []string
	errLines []string
}

// Write takes the next piece of output.
func (l *bootstrapLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.partial = append(l.partial, p...)
	for {
		i := bytes.IndexAny(l.partial, "\r\n")
		if i < 0 {
			break
		}
		if line := strings.TrimSpace(string(l.partial[:i])); line != "" {
			l.line(line)
		}
		l.partial = l.partial[i+1:]
	}
	if len(l.partial) > maxLogLine {
		l.partial = l.partial[:0]
	}
	return len(p), nil
}

func (l *bootstrapLog) line(line string) {
	l.lines = append(l.lines, line)
	if len(l.lines) > keptLogLines {
		l.lines = l.lines[1:]
	}
	if (strings.HasPrefix(line, "E: ") || strings.HasPrefix(line, "Err:") || strings.HasPrefix(line, "dpkg: error")) && len(l.errLines) < 10 {
		l.errLines = append(l.errLines, line)
	}
	if said, ok := strings.CutPrefix(line, "I: "); ok {
		for _, s := range bootstrapStages {
			if strings.HasPrefix(said, s.line) && l.stage != s.stage {
				l.stage, l.done = s.stage, 0
			}
		}
	}
	switch {
	case strings.Contains(line, " newly installed, "):
		// "0 upgraded, 69 newly installed, 0 to remove and 0 not upgraded."
		f := strings.Fields(line)
		for i := range f {
			if f[i] == "newly" && i > 0 {
				l.total, _ = strconv.ParseInt(f[i-1], 10, 64)
				l.done = 0
			}
		}
	case strings.HasPrefix(line, "Get:") && l.stage == "downloading packages",
		strings.HasPrefix(line, "Setting up ") && strings.HasPrefix(l.stage, "installing"):
		l.done++
	}
	p := domain.Progress{Stage: l.stage, Log: line}
	if l.stage == "downloading packages" || strings.HasPrefix(l.stage, "installing") {
		p.Done, p.Total = min(l.done, l.total), l.total
	}
	l.progress.Report(p)
}

// cause says in a few lines what went wrong: the error lines, or else the end.
func (l *bootstrapLog) cause() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.errLines) > 0 {
		return strings.Join(l.errLines, "; ")
	}
	return strings.Join(l.lines[max(0, len(l.lines)-5):], "; ")
}
