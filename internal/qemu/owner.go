package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

const (
	// killLimit bounds the wait for a process that has SIGKILL to die. One
	// that does not is stuck in the host's kernel.
	killLimit = 10 * time.Second
	// defaultTBSizeMiB is TCG's translation cache where [Options] say nothing:
	// it is touched as it fills, and a boot fills about 30 MiB (PSS of a fresh
	// 256 MiB guest: 117 MB with 16, 134 MB with 32 and with all above).
	defaultTBSizeMiB = 64
	// trimEvery is how often the qemu.logs are looked at.
	trimEvery = 10 * time.Second
)

// Options say where an Owner keeps things and what it uses.
type Options struct {
	RunDir     string // sockets and logs; machines live in RunDir/m
	ConsoleDir string // what consoles print
	StateDir   string // the accelerator verdicts; "" keeps them in memory
	Binary     string // path or name of QEMU; "" is qemu-system-x86_64
	Accel      string // "auto", KVM or TCG; "" is auto
	TBSizeMiB  int    // TCG's translation cache; 0 is 64
	// Ready returns nil once the agent behind ep answers. The accelerator
	// probe calls it; without it, auto means TCG.
	Ready func(ctx context.Context, ep domain.Endpoint) error
	Log   *slog.Logger

	// Tests shrink these.
	consoleLimit int64
	resumeEvery  time.Duration
	probeLimit   time.Duration
}

// Owner owns the machines of one run directory. There must be one Owner for a
// run directory, which its caller ensures by a lock.
type Owner struct {
	opts   Options
	log    *slog.Logger
	binary binary
	accel  *accel

	stop context.CancelFunc // ends the goroutines
	wg   sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	machines map[string]*machine // the last of each id
	exits    map[string]domain.Exit
	consoles map[string]*console
}

// NewOwner makes the directories it needs, private to the daemon's user, and
// ends what an accelerator probe of an earlier daemon has left. It starts no
// machine and adopts none.
func NewOwner(opts Options) (*Owner, error) {
	if opts.Binary == "" {
		opts.Binary = defaultBinary
	}
	if opts.TBSizeMiB == 0 {
		opts.TBSizeMiB = defaultTBSizeMiB
	}
	if opts.consoleLimit == 0 {
		opts.consoleLimit = consoleLimit
	}
	if opts.probeLimit == 0 {
		opts.probeLimit = defaultProbeLimit
	}
	if opts.resumeEvery == 0 {
		opts.resumeEvery = resumeEvery
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	if longest := filepath.Join(opts.RunDir, "m", "12345678", consoleSocket); len(longest) > maxSocketPath {
		return nil, fault.New(fault.Invalid, "run directory %s is too long: socket paths in it would have %d bytes, and %d is the most",
			opts.RunDir, len(longest), maxSocketPath).WithNext("Choose a shorter run directory.")
	}
	if !filepath.IsAbs(opts.RunDir) {
		return nil, fault.New(fault.Invalid, "run directory %q is not absolute", opts.RunDir)
	}
	o := &Owner{
		opts:     opts,
		log:      opts.Log,
		binary:   binary{name: opts.Binary},
		machines: map[string]*machine{},
		exits:    map[string]domain.Exit{},
		consoles: map[string]*console{},
	}
	for _, dir := range []string{o.machinesDir(), o.probesDir(), opts.ConsoleDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make directory for machines: %w", err)
		}
	}
	var err error
	if o.accel, err = newAccel(opts); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), killLimit)
	defer cancel()
	if err := o.sweepProbes(ctx); err != nil {
		return nil, err
	}
	life, stop := context.WithCancel(context.Background())
	o.stop = stop
	o.wg.Go(func() { o.trimLogs(life) })
	o.wg.Go(func() { o.accel.tsc() }) // takes 30 ms, which no machine should wait for
	return o, nil
}

func (o *Owner) machinesDir() string       { return filepath.Join(o.opts.RunDir, "m") }
func (o *Owner) probesDir() string         { return filepath.Join(o.opts.RunDir, "p") }
func (o *Owner) runDir(id string) runDir   { return runDir(filepath.Join(o.machinesDir(), id)) }
func (o *Owner) probeDir(id string) runDir { return runDir(filepath.Join(o.probesDir(), id)) }

// Close lets go of the machines, which run on, and waits for every goroutine.
// Calls of Start and Accel should have returned: a Start that has not fails and
// leaves nothing. The channels of Done stay as they are.
func (o *Owner) Close() error {
	o.mu.Lock()
	o.closed = true
	var live []*machine
	for _, m := range o.machines {
		live = append(live, m)
	}
	o.mu.Unlock()
	for _, m := range live {
		m.release()
	}
	o.stop()
	o.wg.Wait()
	return nil
}

// Version finds QEMU. The error is a fault that says what to install.
func (o *Owner) Version(ctx context.Context) (Build, error) { return o.binary.find(ctx) }

// Start begins a machine and returns once it runs: its control socket has
// answered, its console is connected, its guest has been let go. Before that it
// decides on the accelerator, which can take a probe of five seconds once for
// each boot of the host. On any error, ctx's included, no process and no run
// directory is left. Faults: missing (QEMU, a device, a right), wrong_state (the
// machine runs already), in_use (the disk is another process's), no_space (no
// memory, no disk space), timeout, boot_failed (QEMU refused, in its words).
func (o *Owner) Start(ctx context.Context, spec domain.MachineSpec) (domain.Process, error) {
	p, err := o.start(ctx, spec)
	if err != nil {
		return domain.Process{}, fmt.Errorf("start machine %s: %w", spec.ID, err)
	}
	return p, nil
}

func (o *Owner) start(ctx context.Context, spec domain.MachineSpec) (domain.Process, error) {
	if !idPattern.MatchString(spec.ID) {
		return domain.Process{}, fmt.Errorf("machine id %q is not %s", spec.ID, idPattern)
	}
	if m := o.machine(spec.ID); m != nil && !m.over() {
		return domain.Process{}, fault.New(fault.WrongState, "machine %s runs already", spec.ID)
	}
	build, err := o.binary.find(ctx)
	if err != nil {
		return domain.Process{}, err
	}
	verdict, err := o.Accel(ctx, spec)
	if err != nil {
		return domain.Process{}, err
	}
	if n := EffectiveCPUs(verdict.Accel, spec.CPUs); n != spec.CPUs {
		o.log.Warn("software emulation runs one vCPU", "workspace", spec.ID, "asked", spec.CPUs)
	}
	dir := o.runDir(spec.ID)
	if err := o.clear(spec.ID); err != nil {
		return domain.Process{}, err
	}
	con := o.console(spec.ID)
	if err := con.begin(true); err != nil {
		return domain.Process{}, err
	}
	r, err := o.launch(ctx, build, spec, Launch{RunDir: string(dir), Accel: verdict.Accel})
	if err != nil {
		con.end()
		return domain.Process{}, err
	}
	m := o.newMachine(spec.ID, r.process, r.handle, con)
	if err := o.attach(m, r); err != nil {
		con.end()
		return domain.Process{}, errors.Join(err, r.discard())
	}
	return r.process, nil
}

// clear removes what a crash has left in the place of a new machine's run
// directory, unless a process belongs to it.
func (o *Owner) clear(id string) error {
	dir := o.runDir(id)
	if _, err := os.Lstat(string(dir)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	procs, err := processesUnder(o.machinesDir())
	if err != nil {
		return err
	}
	if len(procs[id]) > 0 {
		return fault.New(fault.WrongState, "machine %s has a process already: %d", id, procs[id][0])
	}
	return dir.remove()
}

// Adopt takes back the machine of id that an earlier daemon started: p is what
// its Start returned. It returns [domain.ErrNoMachine] if that very process is
// gone; Exit then says what its log tells. A machine whose control socket does
// not answer is adopted all the same and asked again in the background.
func (o *Owner) Adopt(ctx context.Context, id string, p domain.Process) error {
	if !idPattern.MatchString(id) || p.RunDir != string(o.runDir(id)) {
		return fmt.Errorf("adopt machine %s: %w", id, domain.ErrNoMachine)
	}
	if m := o.machine(id); m != nil && !m.over() {
		return nil
	}
	h, err := openProcess(p)
	if errors.Is(err, domain.ErrNoMachine) {
		reason := "ended while the daemon was away" + after(o.runDir(id).lastWords())
		o.mu.Lock()
		o.exits[id] = domain.Exit{At: time.Now(), Reason: reason}
		o.mu.Unlock()
	}
	if err != nil {
		return fmt.Errorf("adopt machine %s: %w", id, err)
	}
	con := o.console(id)
	if err := con.begin(false); err != nil {
		h.close()
		return fmt.Errorf("adopt machine %s: %w", id, err)
	}
	if err := o.attach(o.newMachine(id, p, h, con), &running{}); err != nil {
		con.end()
		h.close()
		return fmt.Errorf("adopt machine %s: %w", id, err)
	}
	return nil
}

// attach makes m the machine of its id and starts its goroutines.
func (o *Owner) attach(m *machine, r *running) error {
	ctx, release := context.WithCancel(context.Background())
	m.release = release
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		release()
		return fault.New(fault.Unavailable, "the machine owner is closed")
	}
	o.machines[m.id] = m
	delete(o.exits, m.id)
	o.wg.Go(func() {
		defer release()
		m.run(ctx, r)
	})
	return nil
}

func (o *Owner) machine(id string) *machine {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.machines[id]
}

// Done is closed when the machine of id has ended and Exit knows how; at once
// when there is none.
func (o *Owner) Done(id string) <-chan struct{} {
	if m := o.machine(id); m != nil {
		return m.done
	}
	none := make(chan struct{})
	close(none)
	return none
}

// Exit says how the last machine of id ended; the zero value if none is known
// to have.
func (o *Owner) Exit(id string) domain.Exit {
	if m := o.machine(id); m != nil && m.over() {
		return m.exit
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.exits[id]
}

// Paused says why a live machine's guest is held, "" if it is not: the host's
// disk is full, and a write waits until there is room.
func (o *Owner) Paused(id string) string {
	if m := o.machine(id); m != nil && !m.over() {
		return m.heldReason()
	}
	return ""
}

// Kill ends the machine of id, adopted or not, as a power cut does: what the
// guest has synced is on its disk. It waits until no process is left and
// removes the run directory; the console stays. When ctx ends first, or the
// process does not die within ten seconds, the run directory stays too, so
// that List still names it.
func (o *Owner) Kill(ctx context.Context, id string) error {
	if !idPattern.MatchString(id) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	if err := o.kill(ctx, id); err != nil {
		return fmt.Errorf("kill machine %s: %w", id, err)
	}
	return nil
}

func (o *Owner) kill(ctx context.Context, id string) error {
	if m := o.machine(id); m != nil {
		if err := m.kill(ctx); err != nil {
			return err
		}
	}
	// Also what no record or Adopt has led to: a crash between the start of a
	// process and its record leaves one.
	if err := endStrays(ctx, o.machinesDir(), id); err != nil {
		return err
	}
	if err := o.runDir(id).remove(); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if m := o.machines[id]; m != nil && m.over() {
		o.exits[id] = m.exit
		delete(o.machines, id)
	}
	return nil
}

// endStrays kills the processes whose run directory is parent/id and waits for
// their end.
func endStrays(ctx context.Context, parent, id string) error {
	procs, err := processesUnder(parent)
	if err != nil {
		return err
	}
	for _, pid := range procs[id] {
		h, err := openMarked(pid, filepath.Join(parent, id))
		if errors.Is(err, domain.ErrNoMachine) {
			continue
		}
		if err != nil {
			return err
		}
		err = endProcess(ctx, h)
		h.close()
		if err != nil {
			return err
		}
	}
	return nil
}

// endProcess kills and waits; the handle stays open unless ctx ends first.
func endProcess(ctx context.Context, h *handle) error {
	if err := h.kill(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, h.close) // ends the wait
	defer stop()
	if err := h.wait(); err != nil {
		return stuck(h.pid, ctx.Err())
	}
	h.reap()
	return nil
}

func stuck(pid int, err error) error {
	return fault.New(fault.Internal, "process %d has SIGKILL and does not end: %w", pid, err).
		WithNext("Look at /proc/%d/stack and the kernel log: it is stuck in the host's kernel.", pid)
}

// List names the ids that have a run directory or a process.
func (o *Owner) List(context.Context) ([]string, error) {
	return listUnder(o.machinesDir())
}

func listUnder(parent string) ([]string, error) {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	procs, err := processesUnder(parent)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	for id := range procs {
		names = append(names, id)
	}
	return ids(names), nil
}

// trimLogs keeps the machines' logs bounded until ctx is done.
func (o *Owner) trimLogs(ctx context.Context) {
	tick := time.NewTicker(trimEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		o.mu.Lock()
		var dirs []runDir
		for _, m := range o.machines {
			dirs = append(dirs, m.dir)
		}
		o.mu.Unlock()
		for _, d := range dirs {
			if err := d.trimLog(logLimit, logKeep); err != nil {
				o.log.Warn("trim qemu.log", "dir", string(d), "err", err)
			}
		}
	}
}
