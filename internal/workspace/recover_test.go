package workspace

import (
	"context"
	"testing"

	"github.com/agentiso/agentiso/internal/domain"
)

// crash is a Recorder that kills the daemon when an operation is about to take
// one step: nothing that it does afterwards has an effect on the world.
type crash struct {
	op, step string
	view     *view
	seen     bool
}

func (c *crash) Begin(ctx context.Context, op, step, _ string) (context.Context, func(error)) {
	if c.view != nil && op == c.op && step == c.step && !c.seen {
		c.seen = true
		c.view.kill()
	}
	return ctx, func(error) {}
}

// TestCrashAtEachStep kills the daemon at each step of each operation, starts
// another, and asks what is left: nothing of what was cut off, and the
// bystander untouched.
func TestCrashAtEachStep(t *testing.T) {
	ops := map[string]struct {
		steps []string
		run   func(*Service, context.Context) error
		left  []string // of "a" after recovery; %s is its id
	}{
		"create": {[]string{"disk", "network", "machine", "boot", "configure", "record"}, func(s *Service, ctx context.Context) error {
			_, _, err := s.Create(ctx, CreateOptions{Name: "new"})
			return err
		}, []string{"stopped-a"}},
		"start": {[]string{"network", "machine", "boot", "configure", "record"}, func(s *Service, ctx context.Context) error {
			_, _, err := s.Start(ctx, "a")
			return err
		}, []string{"stopped-a"}},
		"stop": {[]string{"shutdown", "machine", "network", "record"}, func(s *Service, ctx context.Context) error {
			if _, _, err := s.Start(ctx, "a"); err != nil {
				return err
			}
			_, err := s.Stop(ctx, "a", false)
			return err
		}, []string{"stopped-a"}},
		"destroy": {[]string{"machine", "network", "disk", "record"}, func(s *Service, ctx context.Context) error {
			_, err := s.Destroy(ctx, "a")
			return err
		}, nil},
	}
	for op, o := range ops {
		for _, step := range o.steps {
			t.Run(op+"/"+step, func(t *testing.T) {
				world := newWorld()
				c := &crash{op: op, step: step}
				s, v := world.daemon(t, c)
				by := mustCreate(t, s, CreateOptions{Name: "bystander"})
				a := mustCreate(t, s, CreateOptions{Name: "a"})
				if _, err := s.Stop(t.Context(), "a", true); err != nil {
					t.Fatal(err)
				}
				c.view = v
				if err := o.run(s, t.Context()); err == nil {
					t.Fatal("the operation succeeded in a dead daemon")
				}
				if !c.seen {
					t.Fatalf("%s has no step %s", op, step)
				}

				world.failAt = ""
				s2, _ := world.daemon(t, nil)
				want := []string{"console " + by.ID, "disk " + by.ID, "link " + by.ID, "machine " + by.ID, "record " + by.ID + " running", "slot " + by.ID}
				if o.left != nil {
					want = append(want, "console "+a.ID, "disk "+a.ID, "record "+a.ID+" stopped")
				}
				wantLeft(t, world, sorted(want)...)
				if got, err := s2.Get(t.Context(), "bystander"); err != nil || got.Machine.PID != by.Machine.PID {
					t.Errorf("bystander is %+v, %v", got, err)
				}
				mustCreate(t, s2, CreateOptions{Name: "new"})
			})
		}
	}
}

func TestRecoverOfRunning(t *testing.T) {
	world := newWorld()
	s, v := world.daemon(t, nil)
	alive := mustCreate(t, s, CreateOptions{Name: "alive"})
	gone := mustCreate(t, s, CreateOptions{Name: "gone"})
	held := mustCreate(t, s, CreateOptions{Name: "held", Ephemeral: true})
	v.kill()
	world.dies(gone.ID, domain.Exit{Reason: "host rebooted"})
	const orphan, foreign = "0rphan00", "photos" // the second has no workspace's form
	world.disks[orphan], world.slots[orphan], world.consoles[orphan] = true, true, "x"
	world.disks[foreign], world.consoles[foreign] = true, "x"

	s2, _ := world.daemon(t, nil)
	for name, want := range map[string]domain.State{"alive": domain.Running, "gone": domain.Stopped} {
		if got, err := s2.Get(t.Context(), name); err != nil || got.State != want {
			t.Errorf("%s is %+v, %v; want %s", name, got, err, want)
		}
	}
	wantLeft(t, world, sorted([]string{
		"console " + alive.ID, "disk " + alive.ID, "link " + alive.ID, "machine " + alive.ID, "record " + alive.ID + " running", "slot " + alive.ID,
		"console " + gone.ID, "disk " + gone.ID, "record " + gone.ID + " stopped",
		"console " + foreign, "disk " + foreign,
	})...)
	if _, err := s2.Get(t.Context(), held.ID); err == nil {
		t.Error("the ephemeral workspace outlived the daemon that held it")
	}
}
